#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "kernels/make_backend.h"

namespace regroup {
namespace {

constexpr index_t kStagingBytes = index_t{2} << 20;
constexpr std::size_t kStagings = 8;  // so many uploads the host may be ahead of the device
// A block has 48 KB of shared memory, static and dynamic, without asking for more.
constexpr std::size_t kUnaskedSharedBytes = 40 << 10;

void free_unless_unwinding(cudaError_t (*free)(void*), void* address) {
  if (!is_unwinding()) free(address);
}

}  // namespace

void check_cuda(cudaError_t result, const char* call, const std::source_location& where) {
  if (result == cudaSuccess) return;
  throw SystemError("{} failed: {} ({}:{})", call, cudaGetErrorString(result), where.file_name(),
                    where.line());
}

CudaStream make_cuda_stream() {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return CudaStream(stream);
}

CudaEvent make_cuda_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return CudaEvent(event);
}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

CudaDevice::CudaDevice(int ordinal) : ordinal_(ordinal) {
  check_cuda(cudaSetDevice(ordinal), "cudaSetDevice");
  check_cuda(cudaGetDeviceProperties(&properties_, ordinal), "cudaGetDeviceProperties");
  stream_ = make_cuda_stream();
  for (std::size_t i = 0; i < kStagings; ++i) {
    staging_.push_back({.memory = allocate_pinned(kStagingBytes), .read = make_cuda_event()});
  }
}

index_t CudaDevice::free_bytes() const {
  std::size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<index_t>(free);
}

std::string CudaDevice::describe() const {
  std::size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return fmt::format("{}, GPU {} of {}, {} MiB, {} MiB free, compute capability {}.{}", properties_.name,
                     ordinal_, cuda_device_count(), total >> 20, free >> 20, properties_.major,
                     properties_.minor);
}

Buffer CudaDevice::allocate(index_t bytes) {
  check(bytes >= 0, "a buffer of {} bytes was asked for", bytes);
  void* memory = nullptr;
  const auto size = static_cast<std::size_t>(std::max<index_t>(bytes, 1));
  const cudaError_t result = cudaMalloc(&memory, size);
  if (result == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or the next check would report it again
    throw UserError(
        "{} bytes of GPU memory were asked for and are not there ({}): a smaller --micro-batch, --recompute "
        "on or a "
        "larger --tensor-parallel needs less",
        bytes, describe());
  }
  check_cuda(result, "cudaMalloc");
  Buffer buffer(memory, bytes, [](void* address) { free_unless_unwinding(cudaFree, address); });
  ++counters_.allocations;
  check_cuda(cudaMemsetAsync(memory, 0, size, stream()), "cudaMemsetAsync");
  return buffer;
}

Buffer CudaDevice::allocate_pinned(index_t bytes) {
  void* memory = nullptr;
  const auto size = static_cast<std::size_t>(std::max<index_t>(bytes, 1));
  const cudaError_t result = cudaHostAlloc(&memory, size, cudaHostAllocDefault);
  if (result == cudaErrorMemoryAllocation) {
    throw UserError("cudaHostAlloc: this host has not {} bytes of memory left that can be pinned (ulimit -l)",
                    size);
  }
  check_cuda(result, "cudaHostAlloc");
  ++counters_.allocations;
  return Buffer(memory, bytes, [](void* address) { free_unless_unwinding(cudaFreeHost, address); });
}

std::byte* CudaDevice::workspace(index_t bytes) {
  if (workspace_.bytes() < bytes) {
    workspace_ =
        Buffer();  // before, so that the two never exist together; cudaFree waits for ops that use it
    workspace_ = allocate(bytes);
  }
  return static_cast<std::byte*>(workspace_.data());
}

void CudaDevice::upload(const void* host, void* device, index_t bytes) {
  const auto* from = static_cast<const std::byte*>(host);
  auto* to = static_cast<std::byte*>(device);
  while (bytes > 0) {
    const auto part = static_cast<std::size_t>(std::min(bytes, kStagingBytes));
    Staging& staging = staging_[next_staging_];
    next_staging_ = (next_staging_ + 1) % staging_.size();
    wait_for(staging.read.get());
    std::memcpy(staging.memory.data(), from, part);
    check_cuda(cudaMemcpyAsync(to, staging.memory.data(), part, cudaMemcpyHostToDevice, stream()),
               "cudaMemcpyAsync to the device");
    check_cuda(cudaEventRecord(staging.read.get(), stream()), "cudaEventRecord");
    ++counters_.uploads;
    from += part;
    to += part;
    bytes -= static_cast<index_t>(part);
  }
}

void CudaDevice::download(const void* device, void* host, index_t bytes) {
  if (bytes == 0) return;
  // A copy to pageable memory blocks until it is done: first wait where guards can look.
  synchronize();
  check_cuda(cudaMemcpyAsync(host, device, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, stream()),
             "cudaMemcpyAsync to the host");
  check_cuda(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
}

void CudaDevice::synchronize() {
  ++counters_.waits;
  wait_until([this] { return cudaStreamQuery(stream()); }, "cudaStreamQuery");
}

void CudaDevice::wait_for(cudaEvent_t event) {
  if (cudaEventQuery(event) == cudaSuccess) return;
  ++counters_.waits;
  wait_until([event] { return cudaEventQuery(event); }, "cudaEventQuery");
}

std::shared_ptr<const CudaDevice::WaitGuard> CudaDevice::guard_waits(WaitGuard guard) {
  auto shared = std::make_shared<const WaitGuard>(std::move(guard));
  guards_.push_back(shared);
  return shared;
}

void CudaDevice::wait_until(const std::function<cudaError_t()>& query, const char* call) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kBetweenGuards(5);
  const auto start = Clock::now();
  auto next_look = start + kBetweenGuards;
  for (;;) {
    const cudaError_t result = query();
    if (result == cudaSuccess) return;
    if (result != cudaErrorNotReady) check_cuda(result, call);
    std::this_thread::yield();
    const auto now = Clock::now();
    if (now < next_look) continue;
    next_look = now + kBetweenGuards;
    for (const auto& entry : guards_) {
      if (const auto guard = entry.lock()) (*guard)(std::chrono::duration<double>(now - start).count());
    }
  }
}

void CudaDevice::launch(const void* kernel, const Grid& grid, void** arguments) {
  if (grid.shared_bytes > kUnaskedSharedBytes && allowed_shared_[kernel] < grid.shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    narrow<int>(grid.shared_bytes)),
               "cudaFuncSetAttribute");
    allowed_shared_[kernel] = grid.shared_bytes;
  }
  ++counters_.launches;
  check_cuda(cudaLaunchKernel(kernel, grid.blocks, grid.threads, arguments, grid.shared_bytes, stream()),
             "cudaLaunchKernel");
}

}  // namespace regroup
