#include "tests/cuda_emulation/fiber.h"

#include <cstdint>
#include <utility>

#include <boost/context/preallocated.hpp>

// Of AddressSanitizer (sanitizer/common_interface_defs.h); absent in other builds.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                          std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom,
                                                           std::size_t* old_size);
}

namespace regroup::emulation {
namespace {

// Frames are a few times larger under the sanitizers. Only what is touched becomes memory.
constexpr std::size_t kStackBytes = std::size_t{256} << 10;

void start_switch(void** fake_stack, const void* bottom, std::size_t size) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(fake_stack, bottom, size);
}
void finish_switch(void* fake_stack, const void** old_bottom, std::size_t* old_size) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_size);
}

}  // namespace

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)), stacks_(kStackBytes) {
  const boost::context::stack_context stack = stacks_.allocate();
  stack_ = {.bottom = static_cast<const std::byte*>(stack.sp) - stack.size, .size = stack.size};
  // Stacks that begin at different places of their pages do not compete for the same lines of a cache.
  const std::size_t shift = reinterpret_cast<std::uintptr_t>(stack.sp) / 4096 % 32 * 128;
  context_ = boost::context::fiber(
      std::allocator_arg,
      boost::context::preallocated(static_cast<std::byte*>(stack.sp) - shift, stack.size - shift, stack),
      stacks_, [this](boost::context::fiber&& host) { return run(std::move(host)); });
}

Fiber::~Fiber() {
  cancelled_ = true;
  if (context_) resume();
}

boost::context::fiber Fiber::run(boost::context::fiber&& host) {
  finish_switch(nullptr, &host_stack_.bottom, &host_stack_.size);
  host_ = std::move(host);
  try {
    if (!cancelled_) body_();
  } catch (const Cancelled&) {
  }
  start_switch(nullptr, host_stack_.bottom, host_stack_.size);
  return std::move(host_);
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  start_switch(&fake_stack, stack_.bottom, stack_.size);
  context_ = std::move(context_).resume();
  finish_switch(fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  void* fake_stack = nullptr;
  start_switch(&fake_stack, host_stack_.bottom, host_stack_.size);
  host_ = std::move(host_).resume();
  finish_switch(fake_stack, &host_stack_.bottom, &host_stack_.size);
  if (cancelled_) throw Cancelled{};
}

}  // namespace regroup::emulation
