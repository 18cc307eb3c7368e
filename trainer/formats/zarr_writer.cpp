#include <algorithm>
#include <array>
#include <new>

#include <zlib.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/formats/zarr.h"

namespace regroup {
namespace {

constexpr int kLevel = 1;  // TensorStore's default

// Writes bytes as one gzip stream.
class Deflater {
 public:
  explicit Deflater(const SharedOutputFile& file) : file_(file) {
    constexpr int kGzip = 15 + 16, kMemory = 8;
    if (deflateInit2(&stream_, kLevel, Z_DEFLATED, kGzip, kMemory, Z_DEFAULT_STRATEGY) != Z_OK) {
      throw std::bad_alloc();
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
      const auto made = std::span<const std::byte>(piece_).first(piece_.size() - stream_.avail_out);
      file_.write(written_, made);
      written_ += made.size();
    } while (flush == Z_FINISH ? code != Z_STREAM_END : stream_.avail_out == 0);
  }

  const SharedOutputFile& file_;
  std::uint64_t written_ = 0;
  z_stream stream_{};
  std::vector<std::byte> piece_ = std::vector<std::byte>(std::size_t{1} << 18);
};

using Extents = std::array<index_t, 2>;

// A vector is a matrix of one column.
Extents matrix_of(const std::vector<index_t>& shape) { return {shape[0], shape.size() == 2 ? shape[1] : 1}; }

// Numbers of chunks along both dimensions.
Extents grid_of(const ZarrMetadata& metadata) {
  const Extents matrix = matrix_of(metadata.shape), chunk = matrix_of(metadata.chunks);
  return {(matrix[0] + chunk[0] - 1) / chunk[0], (matrix[1] + chunk[1] - 1) / chunk[1]};
}

Extents swapped_if(bool swap, const Extents& e) { return swap ? Extents{e[1], e[0]} : e; }

// The elements of the chunk whose first one is `first` (of the file's matrix), zeros beyond the edges.
std::vector<float> chunk_values(const ZarrMetadata& metadata, bool transposed, const Extents& first,
                                const ReadSlice& read) {
  const Extents matrix = matrix_of(metadata.shape), chunk = matrix_of(metadata.chunks);
  const Extents last = {std::min(first[0] + chunk[0], matrix[0]), std::min(first[1] + chunk[1], matrix[1])};
  std::vector<float> values(static_cast<std::size_t>(chunk[0] * chunk[1]));
  // As `read` has them.
  const Extents shape = swapped_if(transposed, matrix), begin = swapped_if(transposed, first),
                end = swapped_if(transposed, last);
  // The dimension whose slice has the least that does not belong here.
  const int dim = (end[0] - begin[0]) * shape[1] <= (end[1] - begin[1]) * shape[0] ? 0 : 1;
  const index_t width = shape[1 - dim];
  const index_t together = std::max<index_t>(1, static_cast<index_t>(values.size()) / width);
  std::vector<float> staged;
  for (index_t at = begin[dim]; at < end[dim]; at += together) {
    Extents slice = shape, from = begin, part = {end[0] - begin[0], end[1] - begin[1]};
    slice[dim] = part[dim] = std::min(together, end[dim] - at);
    from[dim] = 0;  // of the slice
    staged.resize(static_cast<std::size_t>(slice[0] * slice[1]));
    const bool vector = metadata.shape.size() == 1;
    read(dim, at, at + slice[dim],
         Tensor(staged.data(), DType::kFloat32,
                vector ? std::vector<index_t>{slice[0]} : std::vector<index_t>{slice[0], slice[1]}));
    for (index_t r = 0; r < part[0]; ++r) {  // what belongs here, row behind row
      const auto row = staged.begin() + (from[0] + r) * slice[1] + from[1];
      std::copy(row, row + part[1], staged.begin() + r * part[1]);
    }
    Extents place = begin;
    place[dim] = at;
    place = swapped_if(transposed, place);
    float* const to = values.data() + (place[0] - first[0]) * chunk[1] + place[1] - first[1];
    if (transposed) {
      convert_transposed(StoredType::kF32, reinterpret_cast<const std::byte*>(staged.data()), part[0],
                         part[1], DType::kFloat32, to, chunk[1]);
      continue;
    }
    for (index_t r = 0; r < part[0]; ++r) {
      std::copy_n(staged.begin() + r * part[1], part[1], to + r * chunk[1]);
    }
  }
  return values;
}

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
  return json_text(fields);
}

index_t chunk_count(const ZarrMetadata& metadata) {
  const Extents grid = grid_of(metadata);
  return grid[0] * grid[1];
}

std::filesystem::path write_zarr_chunk(const std::filesystem::path& directory, const ZarrMetadata& metadata,
                                       bool transposed, index_t number, const ReadSlice& read) {
  const std::size_t rank = metadata.shape.size();
  check((rank == 1 && !transposed) || rank == 2, "an array of {} dimensions is to be written", rank);
  check(0 <= number && number < chunk_count(metadata), "chunk {} of {}", number, chunk_count(metadata));
  const Extents chunk = matrix_of(metadata.chunks);
  const index_t i = number / grid_of(metadata)[1], j = number % grid_of(metadata)[1];
  std::filesystem::path path =
      directory / (rank == 1 ? fmt::format("{}", i) : fmt::format("{}{}{}", i, metadata.separator, j));
  create_file(path, 0);
  const SharedOutputFile file(path);
  const std::vector<float> values = chunk_values(metadata, transposed, {i * chunk[0], j * chunk[1]}, read);
  Deflater(file).write_all(std::as_bytes(std::span(values)));
  return path;
}

}  // namespace regroup
