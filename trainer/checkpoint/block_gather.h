// Brings the bytes of blocks to the ranks that write them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "parallel/process_group.h"
#include "trainer/checkpoint/block_plan.h"

namespace regroup {

// The blocks that one tensor-parallel group writes, whose ranks hold all their bytes. They are gathered in
// rounds of at most `slots` blocks a rank.
class BlockGather {
 public:
  // `tensors`: this rank's slices, in memory of `backend`; `held`: of gather_slices(); `blocks`: those of
  // this group. Everything but the slices is the same on every rank of `tp`. `files` and `backend` outlive
  // it.
  BlockGather(ProcessGroup tp, Backend& backend, const FilePlan& files, std::vector<ShardedTensor> tensors,
              std::vector<HeldTensor> held, std::vector<Block> blocks, std::size_t slots);

  std::size_t rounds() const { return windows_.size(); }
  // Memory that it keeps for what travels.
  index_t bytes() const { return sent_.bytes() + received_.bytes() + bounce_.bytes(); }
  int ranks() const { return tp_.size(); }
  // This rank's blocks of a round, in order; block i of them lies i x block size from the start of the
  // staging memory.
  std::vector<Block> mine(std::size_t round) const;
  // Fills `staging` with this rank's blocks of the round, `stride` bytes apart. Returns when the tensors may
  // change. Collective over the group.
  void gather(std::size_t round, std::byte* staging, std::uint64_t stride);

 private:
  // Blocks [first, last) travel together, so that what is sent and received stays small.
  struct Window {
    std::size_t first = 0, last = 0;
  };
  void plan_windows();
  std::size_t round_of(const Block& block) const { return block.slot / slots_; }
  std::byte* place_of(const Block& block, std::byte* staging, std::uint64_t stride) const {
    return staging + block.slot % slots_ * stride;
  }
  void exchange(const Window& window);
  void place(const Window& window, std::byte* staging, std::uint64_t stride);
  void copy_local(std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::byte* block);
  void copy_to_host(std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::byte* host);
  static void scatter(const SliceRuns& runs, std::uint64_t begin, std::uint64_t end, const std::byte* from,
                      std::byte* to);

  ProcessGroup tp_;
  Backend& backend_;
  const FilePlan& files_;
  std::vector<ShardedTensor> tensors_;
  std::vector<HeldTensor> held_;
  std::vector<Block> blocks_;  // by round
  std::size_t slots_;
  std::vector<std::vector<Window>> windows_;               // by round
  Buffer sent_, received_;                                 // of the largest window
  std::vector<std::uint64_t> send_bytes_, receive_bytes_;  // by rank, of one window
  Buffer bounce_;                                          // of a device's slice on its way into a block
};

}  // namespace regroup
