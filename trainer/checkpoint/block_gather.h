// Brings the bytes of blocks to the ranks that write them.
#pragma once

#include "trainer/checkpoint/block_exchange.h"

namespace regroup {

class BlockGather : public BlockExchange {
 public:
  // At most `slots` blocks a rank are gathered at once.
  BlockGather(Parts parts, std::size_t slots);
  // Fills `staging` with this rank's blocks of the round, `stride` bytes apart. Returns when the tensors may
  // change. Collective over the group.
  void gather(std::size_t round, std::byte* staging, std::uint64_t stride);

 private:
  void copy_own(const Block& block, std::byte* to);
};

}  // namespace regroup
