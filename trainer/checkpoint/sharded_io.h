// Global tensors written to safetensors files by many ranks, each its own slice. The files know nothing of
// the ranks: any layout reads what any other wrote (checkpoint_reader.h), and all write the same bytes.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "parallel/partition.h"
#include "parallel/process_group.h"
#include "trainer/checkpoint/safetensors.h"

namespace regroup {

struct WriteOptions {
  Metadata metadata = {{"format", "pt"}};  // transformers refuses files without this
  std::uint64_t max_file_bytes =
      5'000'000'000;  // tensor data in one file; a larger tensor is alone in its file
};

// Writes `tensors` into `directory`, as `<stem>.safetensors`, or, where they are larger than one file may be,
// as `<stem>-0000k-of-0000n.safetensors` with `<stem>.safetensors.index.json` (transformers' layout).
// Collective over `group`: every rank passes the same names, global shapes and dtypes in the same order, with
// its own slice in HOST memory (local.dtype is what is stored, and must be set even where it has no data).
// A rank contributes a slice where `writes` is true (the data-parallel rank that writes), slice.replica is 0
// and local.data is not null. InternalError, on every rank and before a file is touched, unless the
// contributed slices cover every tensor exactly once. UserError on every rank where a file cannot be written.
// Returns the names of the files, relative to `directory`.
std::vector<std::string> write_tensors(const ProcessGroup& group, const std::filesystem::path& directory,
                                       const std::string& stem, std::span<const ShardedTensor> tensors,
                                       bool writes, const WriteOptions& options = {});

// A part of a tensor that some rank would write.
struct Contribution {
  int rank = 0;
  std::size_t tensor = 0;  // index into the table
  int dim = 0;
  index_t begin = 0, end = 0;
};
// InternalError naming tensor and ranks unless the contributions cover every tensor of `table` exactly once.
void check_exact_cover(std::span<const ShardedTensor> table, std::vector<Contribution> contributions);

}  // namespace regroup
