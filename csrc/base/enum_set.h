// A set of enumerators, such as those that a row of a table supports.
#pragma once

#include <cstdint>

namespace flash_llm {

// Enumerators must lie in 0 ... 31.
template <typename Enum>
class EnumSet {
 public:
  template <typename... Enums>
  constexpr EnumSet(Enums... members)  // NOLINT(google-explicit-constructor)
      : bits_((bit(members) | ... | 0U)) {}

  constexpr bool contains(Enum member) const { return (bits_ & bit(member)) != 0; }
  constexpr bool contains(EnumSet other) const { return (bits_ & other.bits_) == other.bits_; }
  constexpr bool empty() const { return bits_ == 0; }
  // The first member. The set must not be empty.
  constexpr Enum first() const {
    uint32_t member = 0;
    while ((bits_ >> member & 1U) == 0) ++member;
    return static_cast<Enum>(member);
  }
  // The members that `other` lacks.
  constexpr EnumSet without(EnumSet other) const {
    EnumSet rest;
    rest.bits_ = bits_ & ~other.bits_;
    return rest;
  }
  constexpr void insert(Enum member) { bits_ |= bit(member); }

 private:
  static constexpr uint32_t bit(Enum member) { return 1U << static_cast<uint32_t>(member); }
  uint32_t bits_;
};

}  // namespace flash_llm
