// What the thread that does the work is doing, for another thread that watches over it.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

namespace regroup {

// Written by one thread, read by any. Writing costs a lock that nobody contends for, and no memory once the
// longest operation has been named.
class Heartbeat {
 public:
  struct State {
    std::uint64_t beats = 0;  // signs of progress: beat(), and each begin and end of a Wait
    // Waits begun since set_step(). On ranks that run the same program (step, waits) is the same where none
    // is late, but for the steps in which a checkpoint is saved: tensor-parallel groups gather different
    // tensors.
    std::uint64_t waits = 0;
    std::int64_t step = 0;  // of training
    std::string operation;  // the last beat()'s
    std::string waits_in;   // the innermost Wait, "" while the thread waits for nobody
  };

  // Progress: `operation` begins, or goes on ("reading a batch").
  void beat(std::string_view operation);
  // A step of training begins; Waits are counted anew.
  void set_step(std::int64_t step);
  State state() const;

  // The thread is inside an operation that ends only when other ranks come ("tp all_reduce"); may be nested.
  class Wait {
   public:
    // What `operation` refers to outlives the Wait.
    Wait(Heartbeat& heartbeat, std::string_view operation);
    ~Wait();
    Wait(const Wait&) = delete;
    Wait& operator=(const Wait&) = delete;

   private:
    Heartbeat& heartbeat_;
    std::string_view outer_;
  };

 private:
  mutable std::mutex mutex_;
  std::uint64_t beats_ = 0;
  std::uint64_t waits_ = 0;
  std::int64_t step_ = 0;
  std::string operation_ = "starting";
  std::string_view waits_in_;
};

}  // namespace regroup
