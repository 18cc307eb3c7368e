// A function on a stack of its own that can be suspended in its middle (Boost.Context), also under
// AddressSanitizer.
#pragma once

#include <cstddef>
#include <functional>

#include <boost/context/fiber.hpp>
#include <boost/context/protected_fixedsize_stack.hpp>

namespace regroup::emulation {

class Fiber {
 public:
  // `body` must not throw.
  explicit Fiber(std::function<void()> body);
  // Finishes the body: the suspend() it is in throws Cancelled.
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  struct Cancelled {};

  void resume();   // runs the body up to its next suspend()
  void suspend();  // from within the body

 private:
  // One half of a switch: what AddressSanitizer must know of a stack.
  struct Stack {
    const void* bottom = nullptr;
    std::size_t size = 0;
  };

  boost::context::fiber run(boost::context::fiber&& host);

  std::function<void()> body_;
  boost::context::protected_fixedsize_stack stacks_;
  Stack stack_, host_stack_;
  bool cancelled_ = false;
  boost::context::fiber host_, context_;
};

}  // namespace regroup::emulation
