#include "trainer/formats/slice_runs.h"

#include <cstring>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// Reads short runs by spans of many: one large read costs less than many small ones.
void read_spans(const InputFile& file, std::uint64_t begin, const SliceRuns& runs,
                std::uint64_t runs_per_span, std::byte* memory) {
  std::vector<std::byte> span(runs_per_span * runs.stride);
  for (std::uint64_t first = 0; first < runs.count; first += runs_per_span) {
    const std::uint64_t count = std::min(runs_per_span, runs.count - first);
    file.read(begin + runs.offset + first * runs.stride,
              std::span(span).first((count - 1) * runs.stride + runs.bytes));
    for (std::uint64_t i = 0; i < count; ++i) {
      std::memcpy(memory + (first + i) * runs.bytes, span.data() + i * runs.stride, runs.bytes);
    }
  }
}

}  // namespace

SliceRuns runs_of(const std::vector<index_t>& shape, index_t element_bytes, int dim, index_t begin,
                  index_t end) {
  const auto width = static_cast<std::uint64_t>(element_bytes);
  check(element_bytes > 0, "a slice with elements of {} bytes", element_bytes);
  if (shape.empty()) return {.offset = 0, .count = 1, .bytes = width, .stride = width};
  const auto cut = static_cast<std::size_t>(dim);
  check(dim >= 0 && cut < shape.size() && 0 <= begin && begin <= end && end <= shape[cut],
        "[{}, {}) is not a part of dimension {} of an array of shape [{}]", begin, end, dim,
        fmt::join(shape, ", "));
  std::uint64_t outer = 1;
  std::uint64_t inner = width;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    const auto length = static_cast<std::uint64_t>(shape[d]);
    if (d < cut) outer *= length;
    if (d > cut) inner *= length;
  }
  SliceRuns runs{.offset = static_cast<std::uint64_t>(begin) * inner,
                 .count = outer,
                 .bytes = static_cast<std::uint64_t>(end - begin) * inner,
                 .stride = static_cast<std::uint64_t>(shape[cut]) * inner};
  if (runs.bytes == runs.stride) {  // the whole array is one run
    runs.bytes *= std::exchange(runs.count, 1);
    runs.stride = runs.bytes;
  }
  if (runs.bytes == 0) runs.count = 0;
  return runs;
}

void scatter(const SliceRuns& runs, std::uint64_t begin, std::uint64_t end, const std::byte* part,
             std::byte* range) {
  runs.for_each_within(begin, end, [&](std::uint64_t at, std::uint64_t bytes) {
    std::memcpy(range + (at - begin), part, bytes);
    part += bytes;
  });
}

void gather(const SliceRuns& runs, std::uint64_t begin, std::uint64_t end, const std::byte* range,
            std::byte* part) {
  runs.for_each_within(begin, end, [&](std::uint64_t at, std::uint64_t bytes) {
    std::memcpy(part, range + (at - begin), bytes);
    part += bytes;
  });
}

void read_runs(const InputFile& file, std::uint64_t begin, const SliceRuns& runs, std::byte* memory) {
  constexpr std::uint64_t kShort = std::uint64_t{32} << 10;  // a run worth a read of its own
  constexpr std::uint64_t kSpan = std::uint64_t{1} << 20;
  const std::uint64_t runs_per_span = runs.count == 0 ? 0 : std::min(runs.count, kSpan / runs.stride);
  if (runs.bytes < kShort && runs_per_span > 1) {
    read_spans(file, begin, runs, runs_per_span, memory);
    return;
  }
  for (std::uint64_t run = 0; run < runs.count; ++run) {
    file.read(begin + runs.offset + run * runs.stride, {memory + run * runs.bytes, runs.bytes});
  }
}

}  // namespace regroup
