#include "trainer/checkpoint/block_scatter.h"

#include <utility>

namespace regroup {
namespace {

constexpr std::uint64_t kWindowBytes = std::uint64_t{32} << 20;

}  // namespace

BlockScatter::BlockScatter(Parts parts, std::size_t slots)
    : BlockExchange(std::move(parts), Direction::kFromOwner, slots, kWindowBytes) {}

void BlockScatter::scatter(std::size_t round, const std::byte* staging, std::uint64_t stride) {
  for (const Window& window : windows(round)) {
    for_each_own(window, staging, stride,
                 [&](const Block& block, const std::byte* from) { copy_own(block, from); });
    exchange(
        window,
        [&](const Part& part, std::byte* memory) {
          gather(runs(part.tensor, part.peer), part.begin, part.end,
                 place_of(part.block, staging, stride) + part.at, memory);
        },
        [&](const Part& part, const std::byte* memory) {
          copy_from_host(part.tensor, part.begin, part.end, memory);
        });
  }
}

// What this rank holds of its own block.
void BlockScatter::copy_own(const Block& block, const std::byte* from) {
  for_each_part(files(), block, [&](std::size_t t, std::uint64_t begin, std::uint64_t end, std::uint64_t at) {
    const SliceRuns& own = runs(t, me());
    if (own.within(begin, end) == end - begin) {
      copy_from_host(t, begin, end, from + at);
      return;
    }
    std::byte* const part = touchable(t, begin);
    gather(own, begin, end, from + at, part);
    if (!host_accessible()) copy_from_host(t, begin, end, part);
  });
}

}  // namespace regroup
