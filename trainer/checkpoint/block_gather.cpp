#include "trainer/checkpoint/block_gather.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace regroup {
namespace {

constexpr std::uint64_t kWindowBytes = std::uint64_t{64} << 20;

}  // namespace

BlockGather::BlockGather(Parts parts, std::size_t slots)
    : BlockExchange(std::move(parts), Direction::kToOwner, slots, kWindowBytes) {}

void BlockGather::gather(std::size_t round, std::byte* staging, std::uint64_t stride) {
  for (const Window& window : windows(round)) {
    for_each_own(window, staging, stride, [&](const Block& block, std::byte* to) { copy_own(block, to); });
    exchange(
        window,
        [&](const Part& part, std::byte* memory) { copy_to_host(part.tensor, part.begin, part.end, memory); },
        [&](const Part& part, const std::byte* memory) {
          scatter(runs(part.tensor, part.peer), part.begin, part.end, memory,
                  place_of(part.block, staging, stride) + part.at);
        });
  }
}

// What this rank has of its block.
void BlockGather::copy_own(const Block& block, std::byte* to) {
  const std::string& header = files().files[block.file].header;
  if (block.begin < header.size()) {
    std::memcpy(to, header.data() + block.begin, std::min(header.size() - block.begin, block.bytes));
  }
  for_each_part(files(), block, [&](std::size_t t, std::uint64_t begin, std::uint64_t end, std::uint64_t at) {
    const SliceRuns& own = runs(t, me());
    if (own.within(begin, end) == end - begin) {
      copy_to_host(t, begin, end, to + at);
      return;
    }
    std::byte* const part = touchable(t, begin);
    if (!host_accessible()) copy_to_host(t, begin, end, part);
    scatter(own, begin, end, part, to + at);
  });
}

}  // namespace regroup
