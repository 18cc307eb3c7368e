// Who writes, or reads, which bytes of a checkpoint's files.
//
// A file is a row of blocks of one size (the last may be short). A block is written, and its checksum taken,
// by one rank, which first receives what it lacks of it from the ranks of its tensor-parallel group. The
// blocks are shared out among the data-parallel replicas, who all have the same tensors, and within a replica
// they go to the rank that has most of their bytes: a rank writes 1/ranks of the checkpoint, in large pieces,
// and needs so much staging memory.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/mesh.h"
#include "trainer/formats/file_plan.h"
#include "trainer/formats/slice_runs.h"

namespace regroup {

struct Block {
  std::size_t file = 0;
  std::uint64_t begin = 0, bytes = 0;  // in the file
  int dp_rank = 0, tp_rank = 0;        // who writes it
  std::size_t slot = 0;                // its number among the writer's blocks
};

// A tensor as it lies over the ranks of a tensor-parallel group.
struct HeldTensor {
  std::vector<SliceRuns> runs;  // by tp rank
  std::vector<bool> gives;      // by tp rank: it holds the first of equal slices
  // Whether `source` is where `writer` has (the part that lies in source's slice) from: from itself where it
  // can, else from the first rank that has it.
  bool gives_to(std::size_t source, std::size_t writer) const {
    return source == writer || (gives[source] && !same_slice(source, writer));
  }
  bool same_slice(std::size_t a, std::size_t b) const {
    return runs[a].offset == runs[b].offset && runs[a].bytes == runs[b].bytes;
  }
};

// What every rank of a tensor-parallel group holds, tensor by tensor. Collective over `tp`: every rank passes
// the same names, shapes and types with its own slices. InternalError, on every rank, unless the slices of
// replica 0 cover every tensor exactly once.
std::vector<HeldTensor> gather_slices(const ProcessGroup& tp, const std::vector<ShardedTensor>& tensors);

// Every block of every file, in order. Every slot of a writer lies in the order of the files.
std::vector<Block> plan_blocks(const FilePlan& files, const std::vector<HeldTensor>& held,
                               const Layout& layout, std::uint64_t block_bytes);

// Every file's tree checksum (step_directory.h), from those of its blocks: `of_rank[r][slot]` for the rank of
// coordinates r = dp x tp_size + tp.
std::vector<std::uint64_t> file_checksums(const FilePlan& files, const std::vector<Block>& blocks,
                                          const std::vector<std::vector<std::uint64_t>>& of_rank,
                                          int tp_size);

// Calls work(tensor, begin, end, at) for each part of a tensor in the block: its bytes [begin, end), which
// lie `at` bytes from the block's start.
template <class Work>
void for_each_part(const FilePlan& files, const Block& block, Work&& work) {
  const std::vector<PlacedTensor>& tensors = files.files[block.file].tensors;
  const std::uint64_t block_end = block.begin + block.bytes;
  auto next = std::upper_bound(tensors.begin(), tensors.end(), block.begin,
                               [](std::uint64_t at, const PlacedTensor& tensor) { return at < tensor.end; });
  for (; next != tensors.end() && next->begin < block_end; ++next) {
    const std::uint64_t begin = std::max(next->begin, block.begin);
    const std::uint64_t end = std::min(next->end, block_end);
    if (begin < end) work(next->tensor, begin - next->begin, end - next->begin, begin - block.begin);
  }
}

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
