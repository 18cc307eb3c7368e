// Where a backend comes from: the only place that knows which devices this build has.
#pragma once

#include <memory>
#include <optional>

#include "kernels/backend.h"
#include "kernels/cpu_level.h"

namespace regroup {

enum class DeviceKind { kCpu, kCuda };

struct BackendOptions {
  DeviceKind device = DeviceKind::kCpu;
  int threads = 0;  // CPU: threads for every op; 0: OMP_NUM_THREADS, or all cores this process may run on
  std::optional<CpuLevel> cpu_level;  // CPU: none: the highest that the processor has
  int local_rank = 0;                 // CUDA: which of this host's visible GPUs, modulo their number
  // CUDA: the same algorithm for a shape in every run, on every machine of one kind, in place of the fastest
  // of a measurement.
  bool deterministic = false;
};

// UserError where this build or this host has no such device; SystemError where the device fails.
std::unique_ptr<Backend> make_backend(const BackendOptions& options);

// GPUs that this process sees: 0 in a build without CUDA and on a host without a driver.
int cuda_device_count();

// The CUDA half of make_backend(), in kernels/cuda; a build without CUDA has kernels/no_cuda.cpp instead.
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);

}  // namespace regroup
