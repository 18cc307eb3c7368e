// One file read or written by many ranks at once, through MPI-IO.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "kernels/dtype.h"
#include "parallel/process_group.h"

namespace regroup {

// A block of a row-major array that lies in a file at byte `offset`: [begin, end) of dimension `dim`,
// everything of the others. `memory` is the dense block on this rank.
struct FileBlock {
  std::uint64_t offset = 0;
  std::vector<index_t> shape;  // of the whole array
  index_t element_bytes = 0;
  int dim = 0;
  index_t begin = 0, end = 0;
  std::byte* memory = nullptr;
};

// Creates (or truncates) `path` with `size` bytes and lets every rank write its blocks, then flushes it to
// the disk. Collective; a rank may have none. Blocks of different ranks do not overlap. UserError naming the
// file where it cannot be created or written (disk full included), on every rank.
void write_collectively(const ProcessGroup& group, const std::filesystem::path& path, std::uint64_t size,
                        std::vector<FileBlock> blocks);

// Reads this rank's blocks. Not collective: every rank reads only its own bytes. UserError where the file is
// short.
void read_blocks(const std::filesystem::path& path, const std::vector<FileBlock>& blocks);

}  // namespace regroup
