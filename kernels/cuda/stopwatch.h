// Times work on the device by events on its stream; for the measurements that choose between algorithms.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/cuda/cuda_device.h"

namespace regroup {

class CudaStopwatch {
 public:
  explicit CudaStopwatch(CudaDevice& device) : device_(device), begin_(make_event()), end_(make_event()) {}

  // The milliseconds that the device spent on the quickest of `runs` calls of `issue`, after a first one that
  // is not counted (caches and clocks warm up, kernels are loaded). Waits for the device.
  template <class Issue>
  float quickest(int runs, Issue&& issue) {
    issue();
    float best = std::numeric_limits<float>::infinity();
    for (int run = 0; run < runs; ++run) {
      check_cuda(cudaEventRecord(begin_.get(), device_.stream()), "cudaEventRecord");
      issue();
      check_cuda(cudaEventRecord(end_.get(), device_.stream()), "cudaEventRecord");
      device_.synchronize();
      float milliseconds = 0;
      check_cuda(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "cudaEventElapsedTime");
      best = std::min(best, milliseconds);
    }
    return best;
  }

 private:
  static CudaEvent make_event() {  // with timing
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDefault), "cudaEventCreateWithFlags");
    return CudaEvent(event);
  }

  CudaDevice& device_;
  CudaEvent begin_, end_;
};

}  // namespace regroup
