// One piece of work at a time on a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace regroup {

// The members belong to one thread. The destructor waits for what was started.
class BackgroundJob {
 public:
  BackgroundJob() = default;
  ~BackgroundJob() { join(); }
  BackgroundJob(const BackgroundJob&) = delete;
  BackgroundJob& operator=(const BackgroundJob&) = delete;

  // Waits for the last piece of work first.
  void start(std::function<void()> work) {
    join();
    failure_ = nullptr;
    state_ = State::kDone;  // where there is no thread to be had
    const std::lock_guard starting(mutex_);
    thread_ = std::thread([this, work = std::move(work)] {
      std::exception_ptr failure;
      try {
        work();
      } catch (...) {
        failure = std::current_exception();
      }
      const std::lock_guard lock(mutex_);
      failure_ = failure;
      state_ = failure == nullptr ? State::kDone : State::kFailed;
      ended_.notify_all();
    });
    state_ = State::kBusy;
  }
  bool busy() const { return state() == State::kBusy; }
  bool failed() const { return state() == State::kFailed; }
  // Waits at most so long; whether the work has ended.
  bool wait_for(std::chrono::milliseconds time) const {
    std::unique_lock lock(mutex_);
    return ended_.wait_for(lock, time, [this] { return state_ != State::kBusy; });
  }
  // Waits, and throws what the work threw.
  void rethrow() {
    join();
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  enum class State { kDone, kBusy, kFailed };
  State state() const {
    const std::lock_guard lock(mutex_);
    return state_;
  }
  void join() {
    if (thread_.joinable()) thread_.join();
  }

  mutable std::mutex mutex_;
  mutable std::condition_variable ended_;
  State state_ = State::kDone;
  std::exception_ptr failure_;
  std::thread thread_;
};

}  // namespace regroup
