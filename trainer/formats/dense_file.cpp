#include <algorithm>
#include <utility>

#include "kernels/base/error.h"
#include "trainer/formats/slice_runs.h"
#include "trainer/formats/tensor_file.h"

namespace regroup {
namespace {

constexpr std::uint64_t kStaged = std::uint64_t{4} << 20;  // bytes

void convert_into(StoredType type, const std::byte* from, index_t count, const Tensor& out, index_t at) {
  if (out.dtype == DType::kFloat64) {
    convert_elements(type, from, count, out.as<double>() + at);
  } else {
    convert_elements(type, from, count, out.as<float>() + at);
  }
}

void read_converted(const InputFile& file, std::uint64_t begin, const SliceRuns& runs, StoredType type,
                    const Tensor& out) {
  const auto width = static_cast<std::uint64_t>(size_of(type));
  std::vector<std::byte> staged;
  index_t at = 0;
  const auto convert_part = [&](std::uint64_t offset, const SliceRuns& part) {
    staged.resize(part.count * part.bytes);
    read_runs(file, offset, part, staged.data());
    const auto count = static_cast<index_t>(staged.size() / width);
    convert_into(type, staged.data(), count, out, at);
    at += count;
  };
  if (runs.bytes >= kStaged) {
    runs.for_each_within(0, runs.count * runs.stride, [&](std::uint64_t from, std::uint64_t bytes) {
      for (std::uint64_t done = 0; done < bytes; done += kStaged) {
        const std::uint64_t part = std::min(kStaged, bytes - done);
        convert_part(begin + from + done, {.offset = 0, .count = 1, .bytes = part, .stride = part});
      }
    });
    return;
  }
  const std::uint64_t together = std::max<std::uint64_t>(1, kStaged / std::max<std::uint64_t>(1, runs.bytes));
  for (std::uint64_t run = 0; run < runs.count; run += together) {
    SliceRuns part = runs;
    part.count = std::min(together, runs.count - run);
    convert_part(begin + run * runs.stride, part);
  }
}

// Of a matrix [R, C] that lies as [C, R]: a few of the file's rows at a time.
void read_transposed(const InputFile& file, const StoredTensor& stored, int dim, index_t begin, index_t end,
                     const Tensor& out) {
  const index_t file_rows = stored.shape[1];
  const index_t file_columns = stored.shape[0];
  const index_t first_row = dim == 1 ? begin : 0;
  const index_t last_row = dim == 1 ? end : file_rows;
  const index_t first_column = dim == 0 ? begin : 0;
  const index_t columns = dim == 0 ? end - begin : file_columns;
  const index_t width = size_of(stored.type);
  const index_t together = std::max<index_t>(1, static_cast<index_t>(kStaged) / (columns * width));
  std::vector<std::byte> staged;
  for (index_t row = first_row; row < last_row; row += together) {
    const index_t rows = std::min(together, last_row - row);
    staged.resize(static_cast<std::size_t>(rows * columns * width));
    const SliceRuns runs = runs_of({rows, file_columns}, width, 1, first_column, first_column + columns);
    read_runs(file, stored.begin + static_cast<std::uint64_t>(row * file_columns * width), runs,
              staged.data());
    auto* const to = static_cast<std::byte*>(out.data) + (row - first_row) * size_of(out.dtype);
    convert_transposed(stored.type, staged.data(), rows, columns, out.dtype, to, last_row - first_row);
  }
}

template <class Out>
void transpose(StoredType type, const std::byte* from, index_t rows, index_t columns, Out* to,
               index_t stride) {
  constexpr index_t kTile = 32;  // of columns: rows of `to` that are written side by side
  std::vector<Out> tile(static_cast<std::size_t>(kTile * std::max<index_t>(rows, 1)));
  const index_t width = size_of(type);
  for (index_t first = 0; first < columns; first += kTile) {
    const index_t count = std::min(kTile, columns - first);
    for (index_t r = 0; r < rows; ++r) {
      convert_elements(type, from + (r * columns + first) * width, count, tile.data() + r * kTile);
    }
    for (index_t c = 0; c < count; ++c) {
      Out* const row = to + (first + c) * stride;
      for (index_t r = 0; r < rows; ++r) row[r] = tile[static_cast<std::size_t>(r * kTile + c)];
    }
  }
}

}  // namespace

void convert_transposed(StoredType type, const std::byte* from, index_t rows, index_t columns, DType to_type,
                        void* to, index_t to_stride) {
  check(to_type == DType::kFloat32 || to_type == DType::kFloat64, "a tensor is read into {}",
        name_of(to_type));
  if (to_type == DType::kFloat64) {
    transpose(type, from, rows, columns, static_cast<double*>(to), to_stride);
  } else {
    transpose(type, from, rows, columns, static_cast<float*>(to), to_stride);
  }
}

DenseFile::DenseFile(InputFile file, std::vector<StoredTensor> tensors, Caching caching)
    : file_(std::move(file)), tensors_(std::move(tensors)), caching_(caching) {}

void DenseFile::read_long(std::uint64_t begin, std::uint64_t bytes, StoredType type,
                          const Tensor& out) const {
  if (direct_ == nullptr) direct_ = std::make_unique<DirectReader>(file_.path());
  const index_t width = size_of(type);
  index_t at = 0;
  direct_->read(begin, bytes, static_cast<std::uint64_t>(width), [&](std::span<const std::byte> part) {
    const index_t count = std::ssize(part) / width;
    convert_into(type, part.data(), count, out, at);
    at += count;
  });
}

void DenseFile::read(std::size_t index, int dim, index_t begin, index_t end, const Tensor& out) const {
  const StoredTensor& stored = tensors_[index];
  if (out.numel() == 0) return;
  if (stored.transposed) {
    read_transposed(file_, stored, dim, begin, end, out);
    return;
  }
  const SliceRuns runs = stored.shape.empty() ? runs_of({1}, size_of(stored.type), 0, 0, 1)
                                              : runs_of(stored.shape, size_of(stored.type), dim, begin, end);
  if (caching_ == Caching::kPast && runs.count == 1 && runs.bytes >= DirectReader::kLong) {
    read_long(stored.begin + runs.offset, runs.bytes, stored.type, out);
  } else if (stored.type == stored_type(out.dtype)) {
    read_runs(file_, stored.begin, runs, static_cast<std::byte*>(out.data));
  } else {
    read_converted(file_, stored.begin, runs, stored.type, out);
  }
}

}  // namespace regroup
