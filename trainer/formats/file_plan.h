// Which bytes the tensor files of a checkpoint consist of. A function of names, types and global shapes
// alone: no layout of ranks is in it.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "parallel/partition.h"
#include "trainer/formats/safetensors.h"

namespace regroup {

// The tensors of `<stem>.safetensors`, or of `<stem>-0000k-of-0000n.safetensors` and
// `<stem>.safetensors.index.json` (transformers' layout) where one file would be too large.
struct TensorSet {
  std::string stem;
  std::vector<ShardedTensor> tensors;
};

// Bytes [begin, end) of a file.
struct PlacedTensor {
  std::size_t tensor = 0;  // its number, counted through all sets
  std::uint64_t begin = 0, end = 0;
};

// Of all sets, in order.
std::vector<ShardedTensor> all_tensors(std::span<const TensorSet> sets);

struct PlannedFile {
  std::string name;
  std::string header;                 // its first bytes
  std::vector<PlacedTensor> tensors;  // by position, without overlap
  std::uint64_t bytes = 0;
};

struct FilePlan {
  std::vector<PlannedFile> files;
  std::map<std::string, std::string> indexes;  // small files: name, text

  std::uint64_t bytes() const;  // of `files`
};

struct FileOptions {
  Metadata metadata = {{"format", "pt"}};  // transformers refuses files without this
  std::uint64_t max_file_bytes =
      5'000'000'000;  // tensor data in one file; a larger tensor is alone in its file
};

FilePlan plan_files(std::span<const TensorSet> sets, const FileOptions& options = {});
// The same of tensors that no rank holds: names, types and global shapes.
FilePlan plan_files(const std::string& stem, std::span<const StoredTensor> tensors,
                    const FileOptions& options = {});

// The bytes of the whole tensor.
std::uint64_t global_bytes(const ShardedTensor& tensor);

}  // namespace regroup
