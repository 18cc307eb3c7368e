// The only file with state of its own: a kernel names its thread, and a call of the CUDA runtime its device,
// by nothing but global variables.
#include "tests/cuda_emulation/machine.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"
#include "tests/cuda_emulation/device.h"
#include "tests/cuda_emulation/fiber.h"
#include "tests/cuda_emulation/guarded_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace regroup::emulation {
namespace {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kFinished };

struct Copy {
  void* target;
  const void* source;  // null: zeros
  std::size_t bytes;
};

struct Thread {
  std::size_t number = 0;
  uint3 index{};
  State state = State::kReady;
  const char* waits_for = "";
  void* slot = nullptr;  // of the collective it waits in
  std::exception_ptr error;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;  // groups, oldest first
  std::unique_ptr<Fiber> fiber;
};

std::string text(const uint3& v) { return fmt::format("({}, {}, {})", v.x, v.y, v.z); }

uint3 coordinates(std::size_t number, const dim3& extent) {
  const auto n = static_cast<unsigned>(number);
  return {n % extent.x, n / extent.x % extent.y, n / extent.x / extent.y};
}

class Machine {
 public:
  std::byte* dynamic_shared() { return shared_->data(); }
  Thread& current() { return *current_; }

  void run(const std::function<void()>& kernel, const Launch& launch);
  int synchronize_block(const char* what, bool vote);
  void synchronize_warp(const char* what, void* slot, const Combine& combine);

 private:
  using Warp = std::span<const std::unique_ptr<Thread>>;

  Warp warp(std::size_t number) const {
    const std::size_t first = number * kWarpSize;
    return Warp(threads_).subspan(first, std::min<std::size_t>(kWarpSize, size_ - first));
  }
  std::size_t count(State state) const {
    return static_cast<std::size_t>(
        std::count_if(threads_.begin(), threads_.begin() + static_cast<std::ptrdiff_t>(size_),
                      [=](const auto& thread) { return thread->state == state; }));
  }
  std::vector<std::size_t> permutation(std::size_t size);
  void prepare(std::size_t size);
  void live(Thread& thread);
  void run_block();
  bool run_warp(Warp warp);
  void release_block_barrier();
  [[noreturn]] void report_deadlock() const;

  Order order_ = Order::kForward;
  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  std::optional<GuardedMemory> shared_;
  std::vector<std::unique_ptr<Thread>> threads_;  // the block's `size_`, and more of larger blocks before
  std::size_t size_ = 0;
  std::vector<std::size_t> arrived_;  // by warp, at its barrier
  Thread* current_ = nullptr;
  int votes_ = 0, released_votes_ = 0;
};

std::vector<std::size_t> Machine::permutation(std::size_t size) {
  std::vector<std::size_t> order(size);
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (order_ == Order::kBackward) std::reverse(order.begin(), order.end());
  if (order_ == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

void Machine::run(const std::function<void()>& kernel, const Launch& launch) {
  check(current_ == nullptr, "a kernel was started by a kernel");
  if (!shared_ || shared_->bytes() != launch.shared_bytes) shared_.emplace(launch.shared_bytes);
  kernel_ = &kernel;
  order_ = launch.order;
  random_.seed(launch.seed);
  const dim3 blocks = gridDim = launch.blocks, threads = blockDim = launch.threads;
  prepare(std::size_t{threads.x} * threads.y * threads.z);
  try {
    for (const std::size_t number : permutation(std::size_t{blocks.x} * blocks.y * blocks.z)) {
      blockIdx = coordinates(number, blocks);
      shared_->fill_nan();
      run_block();
    }
  } catch (...) {
    threads_.clear();  // they are in the middle of the kernel
    throw;
  }
}

// Threads keep their stacks from block to block.
void Machine::prepare(std::size_t size) {
  size_ = size;
  while (threads_.size() < size) {
    Thread& thread = *threads_.emplace_back(std::make_unique<Thread>());
    thread.number = threads_.size() - 1;
    thread.fiber = std::make_unique<Fiber>([this, &thread] { live(thread); });
  }
}

void Machine::live(Thread& thread) {
  while (true) {
    try {
      (*kernel_)();
      check(thread.open_copies.empty() && thread.copies.empty(),
            "block {}: thread {} leaves the kernel before its copies in the background are committed and "
            "waited for",
            text(blockIdx), text(thread.index));
    } catch (const Fiber::Cancelled&) {
      throw;
    } catch (...) {
      thread.error = std::current_exception();
    }
    thread.state = State::kFinished;
    thread.fiber->suspend();
  }
}

void Machine::run_block() {
  votes_ = 0;
  for (std::size_t i = 0; i < size_; ++i) {
    Thread& thread = *threads_[i];
    thread.index = coordinates(i, blockDim);
    thread.state = State::kReady;
    thread.open_copies.clear();
    thread.copies.clear();
  }
  const std::size_t warps = (size_ + kWarpSize - 1) / kWarpSize;
  arrived_.assign(warps, 0);
  while (true) {
    bool progress = false;
    for (const std::size_t number : permutation(warps)) {
      // Shuffled, a warp is overtaken by others at each of its own barriers.
      while (run_warp(warp(number))) {
        progress = true;
        if (order_ == Order::kShuffled) break;
      }
    }
    if (progress) continue;
    if (count(State::kFinished) == size_) return;
    if (count(State::kAtBlockBarrier) < size_) report_deadlock();
    release_block_barrier();
  }
}

// Runs each lane that can to its next barrier; false where there was none.
bool Machine::run_warp(Warp warp) {
  bool progress = false;
  for (std::size_t i = 0; i < warp.size(); ++i) {
    Thread& thread = *warp[order_ == Order::kBackward ? warp.size() - 1 - i : i];
    if (thread.state != State::kReady) continue;
    progress = true;
    current_ = &thread;
    threadIdx = thread.index;
    thread.fiber->resume();
    current_ = nullptr;
    if (thread.error) std::rethrow_exception(std::exchange(thread.error, nullptr));
  }
  return progress;
}

void Machine::release_block_barrier() {
  for (std::size_t i = 0; i < size_; ++i) threads_[i]->state = State::kReady;
  released_votes_ = std::exchange(votes_, 0);
}

void Machine::report_deadlock() const {
  const std::size_t finished = count(State::kFinished);
  const auto first = [&](auto is) { return std::find_if(threads_.begin(), threads_.end(), is)->get(); };
  const Thread& stuck = *first([](const auto& t) { return t->state != State::kFinished; });
  const std::string here = fmt::format("block {}: thread {} waits at {} forever: ", text(blockIdx),
                                       text(stuck.index), stuck.waits_for);
  if (finished > 0) {
    const Thread& left = *first([](const auto& t) { return t->state == State::kFinished; });
    throw InternalError("{}thread {} and {} more have left the kernel while others wait", here,
                        text(left.index), finished - 1);
  }
  const Thread& other =
      *first([&](const auto& t) { return std::string_view(t->waits_for) != stuck.waits_for; });
  throw InternalError("{}thread {} waits at {}", here, text(other.index), other.waits_for);
}

int Machine::synchronize_block(const char* what, bool vote) {
  votes_ += vote ? 1 : 0;
  Thread& me = *current_;
  me.waits_for = what;
  me.state = State::kAtBlockBarrier;
  me.fiber->suspend();
  return released_votes_;
}

void Machine::synchronize_warp(const char* what, void* slot, const Combine& combine) {
  Thread& me = *current_;
  me.slot = slot;
  me.waits_for = what;
  me.state = State::kAtWarpBarrier;
  const std::size_t number = me.number / kWarpSize;
  const Warp lanes = warp(number);
  if (++arrived_[number] < lanes.size()) {
    me.fiber->suspend();
    return;
  }
  arrived_[number] = 0;
  AnySlots slots{};
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    if (lanes[i]->waits_for != what && std::string_view(lanes[i]->waits_for) != what) {
      throw InternalError(
          "block {}: lanes of one warp are at different instructions, thread {} at {} and thread {} at {}",
          text(blockIdx), text(lanes[i]->index), lanes[i]->waits_for, text(me.index), what);
    }
    slots[i] = lanes[i]->slot;
  }
  combine(slots);
  for (const auto& thread : lanes) thread->state = State::kReady;
}

Device the_device;
Machine machine;

}  // namespace

Device& device() { return the_device; }

void run(const std::function<void()>& kernel, const Launch& launch) { machine.run(kernel, launch); }

std::byte* dynamic_shared() { return machine.dynamic_shared(); }
int lane() { return static_cast<int>(machine.current().number % kWarpSize); }
int warp() { return static_cast<int>(machine.current().number / kWarpSize); }
int synchronize_block(const char* what, bool vote) { return machine.synchronize_block(what, vote); }
void synchronize_warp(const char* what, void* slot, const Combine& combine) {
  machine.synchronize_warp(what, slot, combine);
}

void copy_later(void* shared, const void* global, std::size_t bytes, bool valid) {
  std::memset(shared, 0xFF, bytes);
  machine.current().open_copies.push_back({shared, valid ? global : nullptr, bytes});
}

void commit_copies() {
  Thread& thread = machine.current();
  thread.copies.push_back(std::exchange(thread.open_copies, {}));
}

void wait_for_copies(std::size_t pending_groups) {
  std::deque<std::vector<Copy>>& groups = machine.current().copies;
  for (; groups.size() > pending_groups; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.source != nullptr) std::memcpy(copy.target, copy.source, copy.bytes);
      if (copy.source == nullptr) std::memset(copy.target, 0, copy.bytes);
    }
  }
}

}  // namespace regroup::emulation
