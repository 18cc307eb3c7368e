// Arrays as directories of chunk files (zarr, version 2; TensorStore's "zarr" driver): <array>/.zarray
// describes the array, "2.0" (or "2/0") is the chunk of rows 2R.. and columns 0.. of an array cut into [R,
// C]. All chunks are of the same size, those at the edges too; each is compressed by itself.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "trainer/formats/byte_source.h"
#include "trainer/formats/chunk_cache.h"
#include "trainer/formats/tensor_file.h"

namespace regroup {

struct ZarrMetadata {
  StoredType type = StoredType::kF32;
  std::vector<index_t> shape, chunks;
  bool compressed = false;  // gzip or zlib
  char separator = '.';     // of a chunk's numbers
  bool zeros = false;       // a chunk that is not there is of zeros; otherwise it is missing

  bool operator==(const ZarrMetadata&) const = default;
};

// From the fields of a .zarray. UserError "<where>: ..." for what is missing, impossible, or not supported:
// other versions, types, compressors, filters, orders, fill values than 0 or none, chunks of more than 4 GiB.
ZarrMetadata zarr_metadata(const nlohmann::json& fields, std::string_view where);
// The text of such a file: gzip, row-major, no fill value.
std::string to_json(const ZarrMetadata& metadata);

// Fills `bytes` with what a gzip or zlib stream decompresses to, a quarter of a MiB of it at a time.
// UserError "<where>: ..." unless that is whole and exactly as much.
void decompress(const ByteSource& source, std::span<std::byte> bytes, std::string_view where);

// One array of up to two dimensions, in the file's own order. Opens chunk files only while it reads them.
class ZarrArray {
 public:
  // `cache`: where its chunks are kept, shared with the other arrays of its checkpoint. It makes the array
  // one for a single thread.
  ZarrArray(std::filesystem::path directory, ZarrMetadata metadata,
            std::shared_ptr<ChunkCache> cache = std::make_shared<ChunkCache>())
      : directory_(std::move(directory)), metadata_(std::move(metadata)), cache_(std::move(cache)) {}

  const ZarrMetadata& metadata() const { return metadata_; }
  // As TensorFile::read() of the matrix, or of its transpose. Memory: the cache's (256 MiB at most, or one
  // chunk where that is larger) and 4 MiB.
  void read(bool transposed, int dim, index_t begin, index_t end, const Tensor& out) const;
  // The bytes of the chunk (i, j) (of a vector (0, j)); null where it is not there, which means zeros.
  // UserError naming its file.
  ChunkBytes read_chunk(index_t i, index_t j) const;
  // The chunk files that must be there and are not, at most `most` of them. Time: of those that are there.
  std::vector<std::filesystem::path> missing_chunks(std::size_t most) const;

 private:
  std::filesystem::path chunk_path(index_t i, index_t j) const;

  std::filesystem::path directory_;
  ZarrMetadata metadata_;
  std::shared_ptr<ChunkCache> cache_;
};

// Fills `out`, dense float32, with [begin, end) of dimension `dim` of a matrix or a vector.
using ReadSlice = std::function<void(int dim, index_t begin, index_t end, const Tensor& out)>;

// How many chunks an array of one or two dimensions is written in.
index_t chunk_count(const ZarrMetadata& metadata);
// Writes one of them as float32 into `directory`, which is there, and returns its file, which nothing has
// flushed to the disk. `number` counts along the rows of chunks; metadata.shape and .chunks are the file's;
// `read` gives slices of the array or, where `transposed`, of its transpose. Where chunks are cut along one
// dimension only, every element is asked for once. Memory: two chunks. UserError where the disk refuses.
std::filesystem::path write_zarr_chunk(const std::filesystem::path& directory, const ZarrMetadata& metadata,
                                       bool transposed, index_t number, const ReadSlice& read);

// Tensors that are zarr arrays.
class ZarrFile final : public TensorFile {
 public:
  // `path`: the file that lists them, for messages. arrays[i] holds tensors[i].
  ZarrFile(std::filesystem::path path, std::vector<StoredTensor> tensors, std::vector<ZarrArray> arrays)
      : path_(std::move(path)), tensors_(std::move(tensors)), arrays_(std::move(arrays)) {}

  const std::filesystem::path& path() const override { return path_; }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  void read(std::size_t index, int dim, index_t begin, index_t end, const Tensor& out) const override {
    if (out.numel() == 0) return;
    arrays_[index].read(tensors_[index].transposed, dim, begin, end, out);
  }

 private:
  std::filesystem::path path_;
  std::vector<StoredTensor> tensors_;
  std::vector<ZarrArray> arrays_;
};

}  // namespace regroup
