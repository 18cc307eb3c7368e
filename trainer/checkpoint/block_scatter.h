// Brings the bytes of blocks from the ranks that read them to all that hold them.
#pragma once

#include "trainer/checkpoint/block_exchange.h"

namespace regroup {

class BlockScatter : public BlockExchange {
 public:
  // At most `slots` blocks a rank are scattered at once.
  BlockScatter(Parts parts, std::size_t slots);
  // Puts into the tensors of every rank, equal slices of several ranks included, what the blocks of the round
  // have of them: this rank's lie in `staging`, `stride` bytes apart. Collective over the group.
  void scatter(std::size_t round, const std::byte* staging, std::uint64_t stride);

 private:
  void copy_own(const Block& block, const std::byte* from);
};

}  // namespace regroup
