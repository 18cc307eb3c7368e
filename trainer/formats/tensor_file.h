// What a reader of one file format offers: tensors under their public names, and any slice of them.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "kernels/base/file.h"
#include "kernels/tensor.h"
#include "trainer/formats/direct_reader.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {

class TensorFile {
 public:
  virtual ~TensorFile() = default;
  TensorFile() = default;
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  virtual const std::filesystem::path& path() const = 0;
  // Names, types and shapes as the model has them (a matrix is [outputs, inputs], whatever the format holds).
  virtual const std::vector<StoredTensor>& tensors() const = 0;
  // Reads [begin, end) of dimension `dim` of tensors()[index] into `out`: dense, float32 or float64, of the
  // slice's shape, from a floating type. A scalar is a row of one. Reads only what the slice needs, as far as
  // the format lets it, a few MiB at a time. UserError naming file and tensor where that fails.
  virtual void read(std::size_t index, int dim, index_t begin, index_t end, const Tensor& out) const = 0;
};

// Tensors that lie in one file as dense arrays (StoredTensor::begin, end, transposed): safetensors, PyTorch's
// archives.
class DenseFile final : public TensorFile {
 public:
  // kPast: long slices are read past the system's cache.
  DenseFile(InputFile file, std::vector<StoredTensor> tensors, Caching caching = Caching::kThrough);

  const std::filesystem::path& path() const override { return file_.path(); }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  void read(std::size_t index, int dim, index_t begin, index_t end, const Tensor& out) const override;

 private:
  void read_long(std::uint64_t begin, std::uint64_t bytes, StoredType type, const Tensor& out) const;

  InputFile file_;
  std::vector<StoredTensor> tensors_;
  Caching caching_;
  mutable std::unique_ptr<DirectReader> direct_;  // from the first long slice on
};

// to[c, r] = from[r, c], `from` dense [rows, columns] of `type`, converted; row c of `to` begins at element
// c * to_stride. InternalError unless `to` is float32 or float64.
void convert_transposed(StoredType type, const std::byte* from, index_t rows, index_t columns, DType to_type,
                        void* to, index_t to_stride);

}  // namespace regroup
