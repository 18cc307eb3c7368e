// The machine that kernels run on in tests: the threads of a block are fibers of the calling thread, blocks
// run one after another. Kernels reach it through device_language.h and ptx.cuh.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector_types.h>

namespace regroup::emulation {

constexpr int kWarpSize = 32;

// In which order blocks, warps that can run, and lanes of a warp run. Forward and backward run a warp as far
// as it gets; shuffled runs it up to its next barrier, then any other. A kernel without races gives the same
// bits in every order.
enum class Order { kForward, kBackward, kShuffled };

struct Launch {
  dim3 blocks = 1, threads = 1;
  std::size_t shared_bytes = 0;
  Order order = Order::kForward;
  std::uint64_t seed = 0;
};

// Runs kernel() as every thread of the grid. InternalError where threads wait for one another forever, or
// some leave while others wait; what a thread throws.
void run(const std::function<void()>& kernel, const Launch& launch);

// ---- For the running thread of a kernel

// The block's dynamic shared memory: 0xFF when the block begins, and of exactly the size asked for.
std::byte* dynamic_shared();
int lane();
int warp();  // of the block
// __syncthreads_count: how many of the block's threads came with `vote`. `what` is for messages.
int synchronize_block(const char* what, bool vote = false);

// A collective of the running warp: once every lane has come, `combine` is called with the slots of all of
// them. A slot holds a lane's arguments and receives its results. A warp that the block does not fill has
// null at the missing lanes.
using AnySlots = std::array<void*, kWarpSize>;
using Combine = std::function<void(const AnySlots&)>;
void synchronize_warp(const char* what, void* slot, const Combine& combine);

template <class Slot>
using Slots = std::array<Slot*, kWarpSize>;
template <class Slot, class F>
void collective(const char* what, Slot& slot, F combine) {
  synchronize_warp(what, &slot, [&combine](const AnySlots& any) {
    Slots<Slot> slots{};
    for (std::size_t i = 0; i < any.size(); ++i) slots[i] = static_cast<Slot*>(any[i]);
    combine(slots);
  });
}

// cp.async. The target holds 0xFF from copy_later() to the wait, for nobody may look at it.
void copy_later(void* shared, const void* global, std::size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(std::size_t pending_groups);

}  // namespace regroup::emulation
