#include "kernels/matmul_peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace regroup {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Numbers of both signs with busy mantissas: some devices are faster on zeros.
void fill(Backend& backend, Tensor x) {
  dispatch(x.dtype, [&]<class T>() {
    std::vector<T> host(static_cast<std::size_t>(x.numel()));
    std::uint32_t state = 1;
    for (T& value : host) {
      state = state * 1664525 + 1013904223;
      value = T(static_cast<float>(state >> 8) * 0x1p-23F - 1);
    }
    backend.copy_from_host(host.data(), x);
  });
}

}  // namespace

double measure_matmul_peak(Backend& backend, DType dtype) {
  constexpr double kLeastRun = 0.02, kTotal = 0.3;  // seconds
  constexpr int kFewestRuns = 4;                    // the first may choose algorithms
  constexpr index_t kSmallest = 256, kLargest = 16384;
  const auto begin = Clock::now();
  for (index_t size = kSmallest;; size *= 2) {
    const index_t bytes = size * size * size_of(dtype);
    const Buffer memory = backend.allocate(3 * bytes);
    const Tensor a = memory.tensor(dtype, {size, size}), b = memory.tensor(dtype, {size, size}, bytes);
    const Tensor c = memory.tensor(dtype, {size, size}, 2 * bytes);
    fill(backend, a);
    fill(backend, b);
    double best = 0, run = 0;
    int runs = 0;
    do {
      backend.synchronize();
      const auto start = Clock::now();
      backend.matmul(a, b, c);
      backend.synchronize();
      run = seconds_since(start);
      const auto n = static_cast<double>(size);
      best = std::max(best, 2 * n * n * n / run);
      ++runs;
    } while (runs < kFewestRuns || (run >= kLeastRun && seconds_since(begin) < kTotal));
    if (run >= kLeastRun || size == kLargest) return best;
  }
}

}  // namespace regroup
