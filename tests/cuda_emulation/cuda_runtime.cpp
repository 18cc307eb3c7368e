// The CUDA runtime of the emulated machine, but for streams and events (streams.cpp). Arguments are checked
// as work is issued.
#include <algorithm>
#include <cstring>
#include <cuda_runtime_api.h>
#include <functional>
#include <memory>
#include <vector>

#include "tests/cuda_emulation/device.h"
#include "tests/cuda_emulation/guarded_memory.h"
#include "tests/cuda_emulation/machine.h"
#include "tests/cuda_emulation/streams.h"

using regroup::emulation::Device;
using regroup::emulation::device;
using regroup::emulation::Order;

namespace {

// The range of the device that a copy of this kind reads (`source`) or writes.
bool is_valid_range(const void* address, std::size_t bytes, cudaMemcpyKind kind, bool source) {
  const bool on_device =
      kind == cudaMemcpyDeviceToDevice || kind == (source ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice);
  return kind == cudaMemcpyDefault || device().contains(address, bytes) == on_device;
}

bool is_valid_grid(dim3 blocks, dim3 threads) {
  return blocks.x > 0 && blocks.y > 0 && blocks.z > 0 && blocks.x <= 0x7FFFFFFF && blocks.y <= 65535 &&
         blocks.z <= 65535 && threads.x > 0 && threads.y > 0 && threads.z > 0 && threads.z <= 64 &&
         std::size_t{threads.x} * threads.y * threads.z <= 1024;
}

}  // namespace

extern "C" {

// ---- The device

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int ordinal) { return ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulated GPU");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = regroup::emulation::kWarpSize;
  properties->totalGlobalMem = Device::kMemoryBytes;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = Device::kDefaultSharedBytes;
  properties->sharedMemPerBlockOptin = Device::most_shared();
  properties->sharedMemPerMultiprocessor = Device::most_shared() + 1024;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = Device::kMemoryBytes;
  *free = *total - device().used();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "error of the emulation";
  }
}

// ---- Memory

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  *memory = device().allocate(bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* memory) {
  regroup::emulation::refuse_while_unwinding("cudaFree");
  regroup::emulation::run_all_streams();
  return memory == nullptr || device().free(memory) ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  *memory = device().allocate_pinned(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  regroup::emulation::refuse_while_unwinding("cudaFreeHost");
  regroup::emulation::run_all_streams();
  return memory == nullptr || device().free_pinned(memory) ? cudaSuccess : cudaErrorInvalidValue;
}
// Memory of the host that is not pinned is read before the call returns, and written then.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!is_valid_range(from, bytes, kind, true) || !is_valid_range(to, bytes, kind, false)) {
    return cudaErrorInvalidValue;
  }
  const auto is_pageable = [bytes](const void* address) {
    return !device().contains(address, bytes) && !device().contains_pinned(address, bytes);
  };
  std::vector<std::byte> staged;
  if (is_pageable(from)) {
    const auto* first = static_cast<const std::byte*>(from);
    staged.assign(first, first + bytes);
  }
  regroup::emulation::issue(stream, [to, from, bytes, staged = std::move(staged)] {
    const Device::Access access(device(), {to, from});
    std::memcpy(to, staged.empty() ? from : staged.data(), bytes);
  });
  return is_pageable(to) ? cudaStreamSynchronize(stream) : cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  cudaError_t result = width > to_pitch || width > from_pitch ? cudaErrorInvalidValue : cudaSuccess;
  for (std::size_t row = 0; row < height && result == cudaSuccess; ++row) {
    result = cudaMemcpyAsync(static_cast<std::byte*>(to) + row * to_pitch,
                             static_cast<const std::byte*>(from) + row * from_pitch, width, kind, stream);
  }
  return result;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  if (!device().contains(memory, bytes)) return cudaErrorInvalidValue;
  regroup::emulation::issue(stream, [memory, value, bytes] {
    const Device::Access access(device(), {memory});
    if (value == 0) regroup::emulation::fill_zero(memory, bytes);
    if (value != 0) std::memset(memory, value, bytes);
  });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  return cudaMemsetAsync(memory, value, bytes, nullptr);
}
cudaError_t cudaMemset2DAsync(void* memory, std::size_t pitch, int value, std::size_t width,
                              std::size_t height, cudaStream_t stream) {
  cudaError_t result = width > pitch ? cudaErrorInvalidValue : cudaSuccess;
  for (std::size_t row = 0; row < height && result == cudaSuccess; ++row) {
    result = cudaMemsetAsync(static_cast<std::byte*>(memory) + row * pitch, value, width, stream);
  }
  return result;
}

// ---- Kernels

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<std::size_t>(value) > Device::most_shared()) return cudaErrorInvalidValue;
  device().allow_shared(kernel, static_cast<std::size_t>(value));
  return cudaSuccess;
}

// `arguments`: as launch.cuh of the emulation makes them. Each stream runs threads in an order of its own.
cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments,
                             std::size_t shared_bytes, cudaStream_t stream) {
  if (!is_valid_grid(blocks, threads)) return cudaErrorInvalidConfiguration;
  if (shared_bytes > device().allowed_shared(kernel)) return cudaErrorInvalidValue;
  const unsigned number = stream == nullptr ? 0 : stream->stream->number();
  const regroup::emulation::Launch launch{.blocks = blocks,
                                          .threads = threads,
                                          .shared_bytes = shared_bytes,
                                          .order = static_cast<Order>(number % 3),
                                          .seed = number};
  regroup::emulation::issue(stream,
                            [thread = *static_cast<const std::function<void()>*>(arguments[0]), launch] {
                              const Device::Access access(device());
                              regroup::emulation::run(thread, launch);
                            });
  return cudaSuccess;
}

}  // extern "C"
