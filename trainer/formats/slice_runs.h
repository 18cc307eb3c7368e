// A slice of a row-major array as bytes: where it lies in the array, which may lie in a file.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/file.h"
#include "kernels/dtype.h"

namespace regroup {

// `count` runs of `bytes` bytes, `stride` bytes apart, the first one `offset` bytes from the array's start.
// In memory a slice is dense: run after run.
struct SliceRuns {
  std::uint64_t offset = 0;
  std::uint64_t count = 0;
  std::uint64_t bytes = 0;
  std::uint64_t stride = 0;

  // The slice's bytes that lie before byte `at` of the array: where its part of [at, ...) begins in memory.
  std::uint64_t before(std::uint64_t at) const {
    if (stride == 0) return 0;
    const std::uint64_t run = at / stride;
    if (run >= count) return count * bytes;
    const std::uint64_t inside = at % stride;
    return run * bytes + (inside > offset ? std::min(inside - offset, bytes) : 0);
  }

  // How many of its bytes lie within [begin, end) of the array.
  std::uint64_t within(std::uint64_t begin, std::uint64_t end) const { return before(end) - before(begin); }

  // Calls work(byte of the array, bytes) for each part of a run within [begin, end) of the array, in order.
  template <class Work>
  void for_each_within(std::uint64_t begin, std::uint64_t end, Work&& work) const {
    if (stride == 0) return;
    for (std::uint64_t run = begin / stride; run < count; ++run) {
      const std::uint64_t first = run * stride + offset;
      if (first >= end) return;
      const std::uint64_t from = std::max(first, begin);
      const std::uint64_t to = std::min(first + bytes, end);
      if (from < to) work(from, to - from);
    }
  }
};

// [begin, end) of dimension `dim`, everything of the others, of an array of `shape` (none: a scalar) with
// elements of `element_bytes`. InternalError where that is no part of it.
SliceRuns runs_of(const std::vector<index_t>& shape, index_t element_bytes, int dim, index_t begin,
                  index_t end);

// The slice's part of [begin, end) of the array, between `part`, where it lies dense, and `range`, which
// holds the bytes [begin, end).
void scatter(const SliceRuns& runs, std::uint64_t begin, std::uint64_t end, const std::byte* part,
             std::byte* range);
void gather(const SliceRuns& runs, std::uint64_t begin, std::uint64_t end, const std::byte* range,
            std::byte* part);

// Reads the slice of an array that begins at byte `begin` of the file into `memory`. UserError where the file
// is short.
void read_runs(const InputFile& file, std::uint64_t begin, const SliceRuns& runs, std::byte* memory);

}  // namespace regroup
