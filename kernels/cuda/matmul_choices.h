// Which of cuBLASLt's algorithms each product runs with, as text: so that a run that goes on elsewhere gives
// the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "kernels/dtype.h"

namespace regroup {

// Everything that a choice of algorithm depends on, on one kind of GPU.
struct MatmulShape {
  index_t m = 0, n = 0, k = 0;
  index_t a_stride = 0, b_stride = 0, c_stride = 0;           // elements from row to row
  index_t a_alignment = 1, b_alignment = 1, c_alignment = 1;  // bytes, a power of two, at most 256
  DType type = DType::kFloat32, c_type = DType::kFloat32;
  bool transpose_a = false, transpose_b = false, accumulate = false;

  bool operator==(const MatmulShape&) const = default;
};

// "bfloat16 to float32, 768 x 32128 x 4096, rows 768 32128 32128, aligned 256 256 256, transpose a, add"
std::string name_of(const MatmulShape& shape);

// The bits of a cublasLtMatmulAlgo_t; they mean something to one version of the library only.
using MatmulAlgorithm = std::array<std::uint64_t, 8>;

class MatmulChoices {
 public:
  // `library`: version of cuBLASLt; `device`: the GPU's name.
  MatmulChoices(std::uint64_t library, std::string device) : library_(library), device_(std::move(device)) {}

  std::optional<MatmulAlgorithm> find(const std::string& shape) const;
  void set(const std::string& shape, const MatmulAlgorithm& algorithm) { algorithms_[shape] = algorithm; }
  std::size_t size() const { return algorithms_.size(); }

  // {"library": 130100, "device": "NVIDIA H200", "products": {name_of(shape): 128 hexadecimal digits, ...}}
  std::string write() const;
  // Adds the choices of such a text, which win over those already here. False, and nothing is added, where
  // the text comes from another version of the library or another kind of GPU. UserError where it is no such
  // text.
  bool read(const std::string& text);

 private:
  std::uint64_t library_;
  std::string device_;
  std::map<std::string, MatmulAlgorithm> algorithms_;
};

}  // namespace regroup
