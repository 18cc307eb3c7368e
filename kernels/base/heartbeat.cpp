#include "kernels/base/heartbeat.h"

#include <utility>

namespace regroup {

void Heartbeat::beat(std::string_view operation) {
  const std::lock_guard lock(mutex_);
  ++beats_;
  operation_.assign(operation);
}

void Heartbeat::set_step(std::int64_t step) {
  const std::lock_guard lock(mutex_);
  step_ = step;
  waits_ = 0;
}

Heartbeat::State Heartbeat::state() const {
  const std::lock_guard lock(mutex_);
  return {.beats = beats_,
          .waits = waits_,
          .step = step_,
          .operation = operation_,
          .waits_in = std::string(waits_in_)};
}

Heartbeat::Wait::Wait(Heartbeat& heartbeat, std::string_view operation) : heartbeat_(heartbeat) {
  const std::lock_guard lock(heartbeat_.mutex_);
  ++heartbeat_.beats_;
  ++heartbeat_.waits_;
  outer_ = std::exchange(heartbeat_.waits_in_, operation);
}

Heartbeat::Wait::~Wait() {
  const std::lock_guard lock(heartbeat_.mutex_);
  ++heartbeat_.beats_;
  heartbeat_.waits_in_ = outer_;
}

}  // namespace regroup
