#include <numeric>

#include <gtest/gtest.h>

#include "kernels/base/file.h"
#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/formats/tensor_file.h"

namespace regroup {
namespace {

using test::TemporaryDirectory;

// A matrix [rows, columns] whose element (r, c) is r * 1000 + c, as a file that may hold its transpose.
std::string stored_matrix(index_t rows, index_t columns, StoredType type, bool transposed) {
  const index_t outer = transposed ? columns : rows;
  const index_t inner = transposed ? rows : columns;
  std::vector<float> values;
  for (index_t o = 0; o < outer; ++o) {
    for (index_t i = 0; i < inner; ++i) {
      values.push_back(static_cast<float>(transposed ? i * 1000 + o : o * 1000 + i));
    }
  }
  std::string bytes(values.size() * static_cast<std::size_t>(size_of(type)), '\0');
  store_elements(values.data(), std::ssize(values), type, reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

template <class Out>
void expect_slices(const TensorFile& file, index_t rows, index_t columns) {
  for (int dim = 0; dim < 2; ++dim) {
    const index_t extent = dim == 0 ? rows : columns;
    for (const auto& [begin, end] : std::vector<std::pair<index_t, index_t>>{
             {0, extent}, {0, 1}, {extent - 1, extent}, {extent / 3, extent / 2 + 1}, {1, 1}}) {
      const index_t r = dim == 0 ? end - begin : rows;
      const index_t c = dim == 1 ? end - begin : columns;
      std::vector<Out> found(static_cast<std::size_t>(r * c), -1);
      file.read(0, dim, begin, end, Tensor(found.data(), dtype_of<Out>(), {r, c}));
      for (index_t i = 0; i < r * c; ++i) {
        const index_t row = i / c + (dim == 0 ? begin : 0);
        const index_t column = i % c + (dim == 1 ? begin : 0);
        ASSERT_EQ(found[static_cast<std::size_t>(i)], static_cast<Out>(row * 1000 + column))
            << "dim " << dim << " [" << begin << ", " << end << ") at " << row << ", " << column;
      }
    }
  }
}

// Small enough for one piece, wider than a tile, and more than one piece.
TEST(DenseFile, ReadsMatricesEitherWay) {
  const TemporaryDirectory directory;
  const std::string before = "seven b";
  for (const auto& [rows, columns] :
       std::vector<std::pair<index_t, index_t>>{{3, 5}, {40, 70}, {70, 33}, {1100, 1300}}) {
    for (const bool transposed : {false, true}) {
      const std::string bytes = stored_matrix(rows, columns, StoredType::kF32, transposed);
      write_text(directory / "file", before + bytes);
      const DenseFile file(InputFile(directory / "file"), {{.name = "t",
                                                            .type = StoredType::kF32,
                                                            .shape = {rows, columns},
                                                            .begin = before.size(),
                                                            .end = before.size() + bytes.size(),
                                                            .transposed = transposed}});
      expect_slices<float>(file, rows, columns);
      expect_slices<double>(file, rows, columns);
    }
  }
}

// Slices longer than the staging memory, from odd places up to the end of the file.
TEST(DenseFile, ReadsPastTheCache) {
  const TemporaryDirectory directory;
  const std::string before = "seven b";
  const index_t rows = 4100, columns = 1030;
  const std::string bytes = stored_matrix(rows, columns, StoredType::kF32, false);
  ASSERT_GT(bytes.size() / 3, DirectReader::kLong / 2);
  write_text(directory / "file", before + bytes);
  const DenseFile file(InputFile(directory / "file"),
                       {{.name = "t",
                         .type = StoredType::kF32,
                         .shape = {rows, columns},
                         .begin = before.size(),
                         .end = before.size() + bytes.size()}},
                       Caching::kPast);
  expect_slices<float>(file, rows, columns);
  expect_slices<double>(file, rows, columns);
}

}  // namespace
}  // namespace regroup
