// Checkpoints of T5X (t5x/checkpoints.py): a file `checkpoint`, msgpack, with the tree {"version",
// "optimizer": {"target": parameters, "state": {"step", "param_states": Adafactor's slots}}}. An array is a
// leaf of that tree ("legacy" checkpoints: all of them), or a zarr array in a directory beside it, of which
// the tree has TensorStore's description. Tensors are offered under transformers' names (names.h), slots
// under the optimizer's of this program: "<parameter>.second_moment", ".second_moment_row",
// ".second_moment_column".
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "trainer/formats/msgpack.h"
#include "trainer/formats/tensor_file.h"
#include "trainer/formats/zarr.h"
#include "trainer/model/config.h"

namespace regroup {

// Which of a matrix' two factored moments T5X's Adafactor keeps as v_row and v_col. `file_shape` is the
// matrix as T5X has it. There v_row is what is left when the longer axis (of equal ones the second) is
// averaged out: it is indexed by the other one. `transposed`: transformers' rows are its columns.
struct FactoredSlots {
  std::string_view row, column;  // T5X's slot of our second_moment_row and second_moment_column
};
FactoredSlots factored_slots(const std::vector<index_t>& file_shape, bool transposed);

// The msgpack file of the T5X checkpoint that `path` names: such a file, a directory that has it under the
// name `checkpoint`, or the directory of a run, which has such directories, or files, called
// checkpoint_<step> (the newest). Nothing where it is something else.
std::optional<std::filesystem::path> t5x_index(const std::filesystem::path& path);

// What such a file holds. Every error is a UserError naming the file and, where there is one, the array. The
// arrays share one cache of chunks (chunk_cache.h): a checkpoint, and what is read from it, is for one
// thread.
class T5xCheckpoint {
 public:
  explicit T5xCheckpoint(std::filesystem::path index);

  // Steps it was trained for, where it says so.
  std::optional<index_t> step() const;
  // Unknown parameters keep the names that they have there, "encoder/...". Arrays that flax cut into pieces
  // (of more than 1 GiB; T5 1.1 has none) are refused by name. Directories of arrays that are missing, and
  // chunks that must be there, are refused together, each by its name (of chunks 65536 at most).
  std::vector<std::unique_ptr<TensorFile>> parameters() const;
  // Adafactor's second moments, of the parameters that are there. Slots that T5X does not use (one zero) and
  // momentum are left out. Empty where it has none.
  std::vector<std::unique_ptr<TensorFile>> moments() const;
  // Whether there are any; told by the index, nothing else is opened.
  bool has_moments() const;

 private:
  struct Leaf {
    std::string path;
    const MsgpackValue* value = nullptr;
  };
  struct Slot;
  struct Found;
  static void flatten(const MsgpackValue& tree, const std::string& path, std::vector<Leaf>& leaves);
  const MsgpackValue* branch(std::span<const char* const> keys) const;
  std::vector<Leaf> leaves(std::span<const char* const> keys) const;
  std::vector<Slot> slots() const;
  std::string describe(const Leaf& leaf) const;
  std::filesystem::path directory_of(const Leaf& leaf) const;
  ZarrArray zarr_array(const Leaf& leaf, bool zeros) const;
  std::vector<index_t> shape_of(const Leaf& leaf) const;
  void add(Found& found, const Leaf& leaf, const std::string& name, bool transposed, bool zeros) const;
  std::vector<std::unique_ptr<TensorFile>> files(Found found) const;

  std::filesystem::path index_;
  MsgpackValue root_;
  std::shared_ptr<ChunkCache> cache_ = std::make_shared<ChunkCache>();  // of all arrays that it gives out
};

// The tensors of a checkpoint's "model" or "optimizer", as CheckpointReader calls them.
std::vector<std::unique_ptr<TensorFile>> open_t5x(const std::filesystem::path& index,
                                                  const std::string& stem);

// The model that has these parameters (by transformers' names), by their shapes; what shapes do not say is as
// T5 1.1 has it. UserError beginning with `where` where none has.
ModelConfig config_of_shapes(const std::vector<const StoredTensor*>& tensors, std::string_view where);

// ---- Writing
// -------------------------------------------------------------------------------------------------

// A tensor to be written, by the names of this program, with its (global) shape.
struct T5xTensor {
  std::string name;
  std::vector<index_t> shape;
};

// A directory checkpoint_<step> that is being filled: zarr arrays of gzip chunks of at most 64 MiB, cut as
// T5X does, then the index. Nothing here is collective: each process writes the chunks it likes, with a
// writer of its own, then calls sync(); one of them writes the index, last. Atomicity is the caller's, who
// gives the directory its final name.
class T5xWriter {
 public:
  // `tensors`: all of them, parameters and their slots. UserError naming one that T5X has no name for.
  T5xWriter(std::filesystem::path directory, const std::vector<T5xTensor>& tensors);

  // Of tensors[i].
  index_t chunks(std::size_t i) const { return chunk_count(arrays_.at(i).metadata); }
  // Writes one chunk of tensors[i]: `read` gives slices of the tensor. Memory as write_zarr_chunk().
  void write(std::size_t i, index_t chunk, const ReadSlice& read);
  // Returns when everything that was written is on the disk.
  void sync() const;
  // Writes the file `checkpoint`. Slots that were not given are T5X's unused ones.
  void write_index(index_t step) const;

 private:
  struct Array {
    std::string path;  // "state/param_states/encoder/.../v_row"
    ZarrMetadata metadata;
    bool transposed = false;
  };

  std::filesystem::path directory_;
  std::vector<Array> arrays_;
  std::set<std::filesystem::path> written_;  // files, and the directories that they are in
};

// The shape of the chunks of an array of `shape`, of at most `elements`: the longest dimension is made its
// next smaller divisor until that is so (t5x/checkpoints.py).
std::vector<index_t> t5x_chunks(const std::vector<index_t>& shape, index_t elements);

}  // namespace regroup
