#include <algorithm>
#include <utility>

#include <zlib.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "trainer/checkpoint/zarr.h"

namespace regroup {
namespace {

constexpr int kLevel = 1;  // TensorStore's default

// Writes bytes as one gzip stream.
class Deflater {
 public:
  explicit Deflater(OutputFile& file) : file_(file) {
    constexpr int kGzip = 15 + 16, kMemory = 8;
    if (deflateInit2(&stream_, kLevel, Z_DEFLATED, kGzip, kMemory, Z_DEFAULT_STRATEGY) != Z_OK) {
      throw SystemError("deflateInit2: no memory");
    }
  }
  ~Deflater() { deflateEnd(&stream_); }
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;

  void write_all(std::span<const std::byte> bytes) {
    constexpr std::size_t kMost = std::size_t{1} << 30;  // zlib counts in 32 bits
    do {
      const auto part = bytes.first(std::min(bytes.size(), kMost));
      bytes = bytes.subspan(part.size());
      stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(part.data()));  // zlib's C, read only
      stream_.avail_in = static_cast<unsigned>(part.size());
      pump(bytes.empty() ? Z_FINISH : Z_NO_FLUSH);
    } while (!bytes.empty());
  }

 private:
  void pump(int flush) {
    int code = Z_OK;
    do {
      stream_.next_out = reinterpret_cast<Bytef*>(piece_.data());
      stream_.avail_out = static_cast<unsigned>(piece_.size());
      code = deflate(&stream_, flush);
      file_.write(std::span<const std::byte>(piece_).first(piece_.size() - stream_.avail_out));
    } while (flush == Z_FINISH ? code != Z_STREAM_END : stream_.avail_out == 0);
  }

  OutputFile& file_;
  z_stream stream_{};
  std::vector<std::byte> piece_ = std::vector<std::byte>(std::size_t{1} << 18);
};

// A vector is a matrix of one column.
std::pair<index_t, index_t> matrix_of(const std::vector<index_t>& shape) {
  return {shape[0], shape.size() == 2 ? shape[1] : 1};
}

// Fills a chunk whose first element is (first_row, first_column) of the file's matrix.
class ChunkFiller {
 public:
  ChunkFiller(const ZarrMetadata& metadata, bool transposed, const ReadRows& read)
      : matrix_(matrix_of(metadata.shape)),
        chunk_(matrix_of(metadata.chunks)),
        transposed_(transposed),
        read_(read),
        values_(static_cast<std::size_t>(chunk_.first * chunk_.second)) {}

  std::span<const float> fill(index_t first_row, index_t first_column) {
    const index_t last_row = std::min(first_row + chunk_.first, matrix_.first);
    const index_t last_column = std::min(first_column + chunk_.second, matrix_.second);
    std::fill(values_.begin(), values_.end(), 0.0F);
    if (transposed_) {
      fill_from(first_column, last_column, matrix_.first, first_row, last_row - first_row);
    } else {
      fill_from(first_row, last_row, matrix_.second, first_column, last_column - first_column);
    }
    return values_;
  }

 private:
  // From elements [skipped, skipped + count) of the rows [begin, end), each of `width`, of what is read.
  void fill_from(index_t begin, index_t end, index_t width, index_t skipped, index_t count) {
    constexpr index_t kStaged = index_t{1} << 20;  // elements
    const index_t together = std::max<index_t>(1, kStaged / width);
    for (index_t row = begin; row < end; row += together) {
      const index_t rows = std::min(together, end - row);
      staged_.resize(static_cast<std::size_t>(rows * width));
      read_(row, row + rows, staged_.data());
      for (index_t r = 0; r < rows; ++r) {  // what belongs to this chunk, side by side
        const auto from = staged_.begin() + r * width + skipped;
        std::copy(from, from + count, staged_.begin() + r * count);
      }
      if (transposed_) {
        convert_transposed(StoredType::kF32, reinterpret_cast<const std::byte*>(staged_.data()), rows, count,
                           DType::kFloat32, values_.data() + row - begin, chunk_.second);
        continue;
      }
      for (index_t r = 0; r < rows; ++r) {
        std::copy_n(staged_.begin() + r * count, count, values_.begin() + (row - begin + r) * chunk_.second);
      }
    }
  }

  std::pair<index_t, index_t> matrix_, chunk_;
  bool transposed_;
  const ReadRows& read_;
  std::vector<float> values_, staged_;
};

}  // namespace

std::string to_json(const ZarrMetadata& metadata) {
  check(metadata.type == StoredType::kF32 && metadata.compressed, "arrays are written as compressed float32");
  const nlohmann::json fields = {{"zarr_format", 2},
                                 {"shape", metadata.shape},
                                 {"chunks", metadata.chunks},
                                 {"dtype", "<f4"},
                                 {"compressor", {{"id", "gzip"}, {"level", kLevel}}},
                                 {"fill_value", nullptr},
                                 {"order", "C"},
                                 {"filters", nullptr},
                                 {"dimension_separator", std::string(1, metadata.separator)}};
  return fields.dump();
}

void write_zarr(const std::filesystem::path& directory, const ZarrMetadata& metadata, bool transposed,
                const ReadRows& read) {
  const std::size_t rank = metadata.shape.size();
  check((rank == 1 && !transposed) || rank == 2, "an array of {} dimensions is to be written", rank);
  regroup::create_directories(directory);
  const auto [rows, columns] = matrix_of(metadata.shape);
  const auto [chunk_rows, chunk_columns] = matrix_of(metadata.chunks);
  ChunkFiller filler(metadata, transposed, read);
  for (index_t i = 0; i * chunk_rows < rows; ++i) {
    for (index_t j = 0; j * chunk_columns < columns; ++j) {
      const std::string name =
          rank == 1 ? fmt::format("{}", i) : fmt::format("{}{}{}", i, metadata.separator, j);
      OutputFile file(directory / name);
      Deflater(file).write_all(std::as_bytes(filler.fill(i * chunk_rows, j * chunk_columns)));
      file.commit();
    }
  }
  write_text(directory / ".zarray", to_json(metadata));
}

}  // namespace regroup
