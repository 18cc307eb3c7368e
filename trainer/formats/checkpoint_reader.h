// Reads slices of the global tensors of a checkpoint, whoever wrote it.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/partition.h"
#include "trainer/formats/safetensors.h"
#include "trainer/formats/tensor_file.h"
#include "trainer/model/parameters.h"

namespace regroup {

// The tensors of a checkpoint. Nothing here is collective: each rank reads what it needs. The files stay
// open. Every error is a UserError naming file and tensor.
class CheckpointReader {
 public:
  // `path`: a safetensors file or PyTorch's (told apart by what they begin with), or a directory that has
  // <stem>.safetensors, or <stem>.safetensors.index.json and its shards (whose names must be plain, which
  // must exist, and must hold exactly what the index says); of a "model", where there are neither, PyTorch's
  // pytorch_model.bin, or pytorch_model.bin.index.json and its shards; or a T5X checkpoint (t5x.h), whose
  // "optimizer" are Adafactor's moments.
  // Caching::kPast: what of it is long and read once may go past the system's cache.
  explicit CheckpointReader(const std::filesystem::path& path, const std::string& stem = "model",
                            Caching caching = Caching::kThrough);
  // Of files that are open already; `path` is for messages.
  CheckpointReader(std::filesystem::path path, std::vector<std::unique_ptr<TensorFile>> files);

  // Whether `directory` holds such a checkpoint, by its files' names or, of T5X's, its index: no tensor is
  // looked for.
  static bool exists(const std::filesystem::path& directory, const std::string& stem = "model");

  const std::filesystem::path& path() const { return path_; }
  // What is read, in the order of their names.
  std::vector<std::filesystem::path> files() const;
  // By name.
  std::vector<const StoredTensor*> tensors() const;
  const StoredTensor* find(const std::string& name) const;              // null where there is none
  const std::filesystem::path& file_of(const std::string& name) const;  // where it lies
  const Metadata& metadata() const { return metadata_; }                // of the (first) file

  // One UserError that lists everything that is wrong: tensors that are missing, have another shape, or are
  // not in the table. Aliases of shared.weight (encoder.embed_tokens.weight, decoder.embed_tokens.weight,
  // lm_head.weight where the table has none) and the unused EncDecAttention.relative_attention_bias of old
  // transformers files are ignored.
  void require(std::span<const ParameterSpec> table) const;
  void require(std::span<const ShardedTensor> table) const;  // global shapes

  // Reads [begin, end) of dimension `dim` of `name` into `out`: dense, float32 or float64, of the slice's
  // shape. Stored F64, F32, F16 and BF16 are converted; other types are refused. Only the needed bytes are
  // read.
  void read(const std::string& name, int dim, index_t begin, index_t end, const Tensor& out) const;
  // Reads the slice of `destination` into its host memory; the stored global shape must be the one it has.
  void read(const ShardedTensor& destination) const;

 private:
  struct Location {
    std::size_t file = 0, index = 0;  // files_[file]->tensors()[index]
  };
  std::unique_ptr<TensorFile> open_file(const std::filesystem::path& path);
  void open_indexed(const std::filesystem::path& index, std::string_view suffix);
  void add(std::unique_ptr<TensorFile> file);
  const StoredTensor& stored(const Location& location) const {
    return files_[location.file]->tensors()[location.index];
  }
  const Location& locate(const std::string& name) const;
  void require_shapes(const std::map<std::string, std::vector<index_t>>& expected) const;

  std::filesystem::path path_;
  Caching caching_;
  std::vector<std::unique_ptr<TensorFile>> files_;
  std::map<std::string, Location> locations_;
  Metadata metadata_;
};

}  // namespace regroup
