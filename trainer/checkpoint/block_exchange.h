// What bringing bytes to the blocks they belong to (block_gather.h) and from there to those who need them
// (block_scatter.h) have in common: what travels within a tensor-parallel group, in bounded pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "parallel/process_group.h"
#include "trainer/checkpoint/block_plan.h"

namespace regroup {

// Host memory for blocks, which disks read and write without another copy. All of it is there from the start.
class BlockMemory {
 public:
  BlockMemory() = default;
  // Of `lent`, which somebody else owns, where that is large enough.
  BlockMemory(Backend& backend, std::uint64_t bytes, std::span<std::byte> lent = {});
  std::byte* data() const { return data_; }  // a multiple of kDirectAlignment
  index_t own_bytes() const { return own_.bytes(); }

 private:
  Buffer own_;
  std::byte* data_ = nullptr;
};

// The blocks of one tensor-parallel group, whose ranks hold all their bytes in slices of tensors. A block
// lies in the staging memory of the one rank that writes or reads it, its owner (Block::tp_rank). Blocks are
// gone through in rounds of at most `slots` a rank.
class BlockExchange {
 public:
  // What a group has. `tensors`: this rank's slices, in memory of `backend`; `held`: of gather_slices();
  // `blocks`: those of this group. Everything but the slices is the same on every rank of `tp`. `files` and
  // `backend` outlive it.
  struct Parts {
    ProcessGroup tp;
    Backend& backend;
    const FilePlan& files;
    std::vector<ShardedTensor> tensors;
    std::vector<HeldTensor> held;
    std::vector<Block> blocks;
    std::span<std::byte> memory = {};  // of the host, that may be used while this object lives
  };

  std::size_t rounds() const { return windows_.size(); }
  // Memory that it keeps for what travels.
  index_t bytes() const { return memory_.own_bytes(); }
  int ranks() const { return parts_.tp.size(); }
  // This rank's blocks of a round, in order; block i of them lies i x block size from the start of the
  // staging memory.
  std::vector<Block> mine(std::size_t round) const;

 protected:
  enum class Direction { kToOwner, kFromOwner };
  BlockExchange(Parts parts, Direction direction, std::size_t slots, std::uint64_t window_bytes);
  ~BlockExchange() = default;

  // Blocks [first, last) travel together, so that what is sent and received stays small.
  struct Window {
    std::size_t first = 0, last = 0;
    bool travels = false;  // whether any rank sends anything
  };
  // Bytes [begin, end) of a tensor, which lie `at` bytes from the start of a block.
  struct Part {
    const Block& block;
    std::size_t tensor = 0;
    std::uint64_t begin = 0, end = 0, at = 0;
    std::size_t peer = 0;  // the rank whose slice has some of it, and which is not the block's owner
  };
  using Copy = std::function<void(const Part&, std::byte* memory)>;

  const std::vector<Window>& windows(std::size_t round) const { return windows_[round]; }
  // Calls work(block, its place in the staging memory) for this rank's blocks of a window.
  template <class Byte, class Work>
  void for_each_own(const Window& window, Byte* staging, std::uint64_t stride, Work&& work) const {
    for (std::size_t i = window.first; i < window.last; ++i) {
      if (owner(i) == me()) work(parts_.blocks[i], place_of(parts_.blocks[i], staging, stride));
    }
  }
  template <class Byte>
  Byte* place_of(const Block& block, Byte* staging, std::uint64_t stride) const {
    return staging + block.slot % slots_ * stride;
  }
  // Sends what pack() puts into memory and gives to place() what came: the bytes that the peer's slice has of
  // each part, dense. Collective over the group.
  void exchange(const Window& window, const Copy& pack, const Copy& place);

  const FilePlan& files() const { return parts_.files; }
  const SliceRuns& runs(std::size_t tensor, std::size_t rank) const { return parts_.held[tensor].runs[rank]; }
  std::size_t me() const { return static_cast<std::size_t>(parts_.tp.rank()); }
  // Between this rank's part of [begin, end) of a tensor and host memory, where it is dense.
  void copy_to_host(std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::byte* host);
  void copy_from_host(std::size_t tensor, std::uint64_t begin, std::uint64_t end, const std::byte* host);
  // That part itself, where the host may touch it; else memory for it on its way.
  std::byte* touchable(std::size_t tensor, std::uint64_t begin) const;
  bool host_accessible() const { return parts_.backend.host_accessible(); }

 private:
  void plan_windows(std::uint64_t window_bytes);
  bool travels(const Window& window) const;
  void reserve_memory();
  Tensor local_part(std::size_t tensor, std::uint64_t begin, std::uint64_t end) const;
  // Calls work(part, bytes) for what travels between the owner of block number `i` and `peer`, in the order
  // in which it travels.
  template <class Work>
  void for_each_travelling(std::size_t i, std::size_t peer, Work&& work) const;
  // The same for everything that this rank sends to `rank` in a window, or receives from there.
  template <class Work>
  void for_each_sent(const Window& window, std::size_t rank, Work&& work) const;
  template <class Work>
  void for_each_received(const Window& window, std::size_t rank, Work&& work) const;
  template <class Work>
  void for_each_between(const Window& window, std::size_t owner, std::size_t peer, Work&& work) const;
  std::size_t owner(std::size_t i) const { return static_cast<std::size_t>(parts_.blocks[i].tp_rank); }
  std::size_t group_size() const { return static_cast<std::size_t>(parts_.tp.size()); }

  Parts parts_;  // blocks by round
  Direction direction_;
  std::size_t slots_;
  std::vector<std::vector<Window>> windows_;  // by round
  BlockMemory memory_;
  std::byte* outgoing_ = nullptr;  // of the largest window
  std::byte* incoming_ = nullptr;
  std::byte* bounce_ = nullptr;                            // of a device's slice on its way
  std::vector<std::uint64_t> send_bytes_, receive_bytes_;  // by rank, of one window
};

}  // namespace regroup
