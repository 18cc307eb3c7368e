// Streams of the emulated device. Work that is issued runs late: when somebody waits for it. Some of it runs
// at once, chosen by a coin that falls the same way in every run. So either of two streams may be ahead of
// the other, and where the code forgot to let one wait, results are wrong.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>
#include <deque>
#include <functional>
#include <memory>

namespace regroup::emulation {

class Stream {
 public:
  // Done, or to be called again because another process has not come yet.
  using Work = std::function<bool()>;

  explicit Stream(unsigned number) : number_(number) {}

  unsigned number() const { return number_; }
  void issue(Work work);
  // As issue(), and it begins as soon as the waits before it allow: other processes wait for it.
  void issue_now(Work work);
  // How many pieces of work were issued so far.
  std::uint64_t issued() const { return issued_; }
  // Runs the first `count` of all that was ever issued; false where something of it is not done yet.
  bool reach(std::uint64_t count);

 private:
  unsigned number_;
  std::deque<Work> queue_;
  std::uint64_t issued_ = 0, done_ = 0;
};

// Of a handle; null for the default stream, whose work runs at once.
std::shared_ptr<Stream> stream_of(cudaStream_t handle);
// Work that ends when it is called.
void issue(cudaStream_t handle, std::function<void()> work);
// Runs all that was issued to any stream, and waits for other processes where that needs them.
void run_all_streams();

}  // namespace regroup::emulation

struct CUstream_st {
  std::shared_ptr<regroup::emulation::Stream> stream;
};
