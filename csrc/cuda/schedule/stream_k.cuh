// Stream-K (Osama et al., arXiv 2301.03598), the even-handed form of split-K: the tiles of the
// whole problem form one line, tile row after tile row, and each CTA takes an equal stretch of it,
// wherever it starts and ends.
//
//   tile rows      |----- row 0 -----|----- row 1 -----|----- row 2 -----|
//   CTAs           [--- 0 ---)[--- 1 ---)[--- 2 ---)[--- 3 ---)[-- 4 --)
//
// A row that one CTA covers alone is finished by it. Every other row is cut: its CTAs leave fp32
// sums in the workspace and a second small kernel adds them in the order of K, so that results are
// repeatable bit for bit. A CTA leaves at most two partial rows: one that began before it (slot 0)
// and one that begins in it and ends after it (slot 1).
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

struct StreamK {
  int units;  // tiles of work: rows * tile_cols
  int tile_cols;
  int ctas;                        // at most `units`, so every CTA has work
  int units_per_cta, extra_units;  // units / ctas and units % ctas: the first CTAs take one more

  StreamK() = default;
  explicit StreamK(const WorkGrid& work)
      : units(static_cast<int>(work.units())),
        tile_cols(static_cast<int>(work.cols)),
        ctas(static_cast<int>(work.workers)),
        units_per_cta(units / ctas),
        extra_units(units % ctas) {}

  FLASH_LLM_HOST_DEVICE int first_unit(int cta) const {
    return cta * units_per_cta + (cta < extra_units ? cta : extra_units);
  }

  // The CTA that works on a unit.
  FLASH_LLM_HOST_DEVICE int cta_of(int unit) const {
    const int in_longer_ctas = extra_units * (units_per_cta + 1);
    return unit < in_longer_ctas ? unit / (units_per_cta + 1)
                                 : extra_units + (unit - in_longer_ctas) / units_per_cta;
  }

  // Whether any tile row is shared between CTAs.
  bool cuts_rows() const { return extra_units != 0 || units_per_cta % tile_cols != 0; }
};

}  // namespace flash_llm
