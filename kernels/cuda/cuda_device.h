// A GPU as the CUDA ops see it: one compute stream, its memory, and a count of everything that costs time on
// the host.
#pragma once

#include <cstddef>
#include <cuda_runtime_api.h>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/tensor.h"

namespace regroup {

// SystemError naming `call`'s error and the line that made it, unless `result` is success.
void check_cuda(cudaError_t result, const char* call,
                const std::source_location& where = std::source_location::current());

// Whether an exception unwinds the stack, which may be that the device hangs. To free what is on it would
// wait for it, and the exception would not arrive: it is left to the end of the process.
inline bool is_unwinding() { return std::uncaught_exceptions() > 0; }

struct DestroyStream {
  void operator()(cudaStream_t stream) const noexcept {
    if (!is_unwinding()) cudaStreamDestroy(stream);
  }
};
struct DestroyEvent {
  void operator()(cudaEvent_t event) const noexcept {
    if (!is_unwinding()) cudaEventDestroy(event);
  }
};
using CudaStream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream>;
using CudaEvent = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, DestroyEvent>;
CudaStream make_cuda_stream();  // runs beside other streams, the legacy default stream included
CudaEvent make_cuda_event();    // without timing

// What has happened so far. In steady state a training step allocates nothing and waits a fixed number of
// times.
struct CudaCounters {
  index_t allocations = 0;  // of device or pinned memory
  index_t waits = 0;        // of the host for the device
  index_t launches = 0;     // of our kernels
  index_t uploads = 0;      // copies to the device
};

struct Grid {
  dim3 blocks = 1;
  dim3 threads = 1;
  std::size_t shared_bytes = 0;  // dynamic shared memory of a block
};

// Blocks of `per_block` that hold `size`: an extent of a grid, below 2^31.
inline unsigned block_count(index_t size, index_t per_block) {
  return static_cast<unsigned>(narrow<int>((size + per_block - 1) / per_block));
}

class CudaDevice {
 public:
  // The visible GPU number `ordinal`. SystemError where it cannot be used.
  explicit CudaDevice(int ordinal);
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  int ordinal() const { return ordinal_; }
  const cudaDeviceProp& properties() const { return properties_; }
  int multiprocessors() const { return properties_.multiProcessorCount; }
  // 10 major + minor: 80 for A100, 90 for H100 and H200.
  int compute_capability() const { return 10 * properties_.major + properties_.minor; }
  index_t free_bytes() const;  // of its memory
  // "NVIDIA H100 80GB HBM3, GPU 0 of 1, 80995 MiB, 80512 MiB free, compute capability 9.0"
  std::string describe() const;

  // Every op runs on this stream, in the order of the calls.
  cudaStream_t stream() const { return stream_.get(); }
  const CudaCounters& counters() const { return counters_; }

  Buffer allocate(index_t bytes);         // zeroed memory of the device
  Buffer allocate_pinned(index_t bytes);  // host memory that the device copies from and to at full speed
  // Uninitialised device memory for the op being run, valid until the next call: later ops on the stream may
  // use it again. Kept between ops; grows where an op needs more than any before it, which is in the first
  // step.
  std::byte* workspace(index_t bytes);

  // Copies in stream order. On return of upload() `host` may be written again and ops issued later see the
  // data, without a wait: it goes through pinned memory. download() waits.
  void upload(const void* host, void* device, index_t bytes);
  void download(const void* device, void* host, index_t bytes);
  // Waits for everything issued, or for an event of any stream.
  void synchronize();
  void wait_for(cudaEvent_t event);

  // Called every few milliseconds while the host waits for the device, with the seconds waited so far; throws
  // to end the wait. In force until the returned pointer is gone.
  using WaitGuard = std::function<void(double seconds)>;
  std::shared_ptr<const WaitGuard> guard_waits(WaitGuard guard);

  // Runs a kernel on the stream; through launch() of launch.cuh.
  void launch(const void* kernel, const Grid& grid, void** arguments);

 private:
  // Pinned memory in parts: one is filled while the device reads others.
  struct Staging {
    Buffer memory;
    CudaEvent read;  // the device has read it
  };

  // Until `query` says done; cudaErrorNotReady is "not yet".
  void wait_until(const std::function<cudaError_t()>& query, const char* call);

  int ordinal_;
  cudaDeviceProp properties_{};
  CudaStream stream_;
  CudaCounters counters_;
  Buffer workspace_;
  std::vector<Staging> staging_;
  std::size_t next_staging_ = 0;
  std::vector<std::weak_ptr<const WaitGuard>> guards_;
  std::map<const void*, std::size_t>
      allowed_shared_;  // dynamic shared memory, of kernels that have asked for more
};

}  // namespace regroup
