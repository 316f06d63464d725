// Runs a packed layer without Python and compares it with the dense layer that it was packed from:
//   packed_layer LIBRARY PACKED DENSE LAYER
// LIBRARY is libflash_llm.so, PACKED and DENSE are safetensors files, and LAYER is the layer's name
// in both. Exit code 0: they agree; 1: they differ; 2: something is missing or broken.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

// A safetensors file: the length of its header, the header in JSON, the tensors' bytes.
class Safetensors {
 public:
  explicit Safetensors(const std::string& path) : path_(path), file_(path, std::ios::binary) {
    uint64_t length = 0;
    file_.read(reinterpret_cast<char*>(&length), sizeof length);
    check(file_ && length <= std::filesystem::file_size(path) - sizeof length, "no whole header");
    std::string text(length, ' ');
    file_.read(text.data(), static_cast<std::streamsize>(length));
    header_ = nlohmann::json::parse(text);
    data_begin_ = sizeof length + length;
  }

  bool has(const std::string& name) const { return header_.contains(name); }

  at::Tensor read(const std::string& name) {
    check(has(name), "no tensor " + name);
    const nlohmann::json& entry = header_[name];
    const auto shape = entry["shape"].get<std::vector<int64_t>>();
    const auto [begin, end] = entry["data_offsets"].get<std::pair<uint64_t, uint64_t>>();
    at::Tensor tensor = at::empty(shape, dtype(entry["dtype"].get<std::string>()));
    check(end - begin == tensor.nbytes(), name + " is not as long as its shape says");
    file_.seekg(static_cast<std::streamoff>(data_begin_ + begin));
    file_.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(end - begin));
    check(static_cast<bool>(file_), name + " is cut short");
    return tensor;
  }

 private:
  void check(bool good, const std::string& problem) const {
    if (!good) throw std::runtime_error(path_ + ": " + problem);
  }

  at::ScalarType dtype(const std::string& name) const {
    if (name == "F16") return at::kHalf;
    if (name == "BF16") return at::kBFloat16;
    if (name == "I32") return at::kInt;
    check(name == "I64", "this example does not read " + name);
    return at::kLong;
  }

  std::string path_;
  std::ifstream file_;
  nlohmann::json header_;
  uint64_t data_begin_ = 0;
};

using Spmm = at::Tensor(const at::Tensor& x, at::IntArrayRef header, const at::Tensor& offsets,
                        const at::Tensor& payload, const std::optional<at::Tensor>& bias,
                        std::string_view activation, std::string_view config, int64_t ctas,
                        bool prefetch, std::string_view x_quantization);

int run(const std::string& library, const std::string& packed_path, const std::string& dense_path,
        const std::string& layer) {
  // Loading registers the operators with torch's dispatcher, where they are found by name.
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  const auto spmm =
      c10::Dispatcher::singleton().findSchemaOrThrow("flash_llm::spmm", "").typed<Spmm>();

  const at::Device device(at::hasCUDA() ? at::kCUDA : at::kCPU);
  Safetensors packed(packed_path), dense(dense_path);
  const at::Tensor header = packed.read(layer + ".weight_header");
  const at::Tensor offsets = packed.read(layer + ".weight_offsets").to(device);
  const at::Tensor payload = packed.read(layer + ".weight_payload").to(device);
  const at::Tensor weight = dense.read(layer + ".weight").to(device);
  std::optional<at::Tensor> bias;
  if (packed.has(layer + ".bias")) bias = packed.read(layer + ".bias").to(device);

  const at::Tensor x = at::randn({8, weight.size(1)}, weight.options());  // 8 tokens
  const at::IntArrayRef ints(header.const_data_ptr<int64_t>(), header.numel());
  const at::Tensor y = spmm.call(x, ints, offsets, payload, bias, "none", "auto", 0, true, "none");

  at::Tensor expected = at::matmul(x.to(at::kFloat), weight.to(at::kFloat).t());
  if (bias) expected += bias->to(at::kFloat);
  const double error = ((y - expected).abs().max() / expected.abs().max()).item<double>();
  // One unit in the last place of the largest output. y is rounded once, by at most half of that.
  const double limit = weight.scalar_type() == at::kHalf
                           ? static_cast<double>(std::numeric_limits<at::Half>::epsilon())
                           : static_cast<double>(std::numeric_limits<at::BFloat16>::epsilon());
  std::cout << layer << " " << weight.sizes() << " on " << device << ": "
            << offsets.nbytes() + payload.nbytes() << " bytes packed, " << weight.nbytes()
            << " dense, relative error " << error << " (limit " << limit << ")\n";
  return error <= limit ? 0 : 1;  // NaN fails too
}

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("usage: packed_layer LIBRARY PACKED DENSE LAYER");
  return run(argv[1], argv[2], argv[3], argv[4]);
} catch (const std::exception& error) {
  std::cerr << "packed_layer: " << error.what() << "\n";
  return 2;
}
