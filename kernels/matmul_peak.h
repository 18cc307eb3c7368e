// What this machine's matrix product can do: the yardstick of the progress line and of benchmarks.
#pragma once

#include "kernels/backend.h"

namespace regroup {

// FLOP/s of a large square product c = a b in `dtype` on `backend`, the best of a few runs in about 0.3 s.
// The size grows until a run takes at least 20 ms (or reaches 16384). Allocates its matrices for the time of
// the call; the products count in backend.flops().
double measure_matmul_peak(Backend& backend, DType dtype);

}  // namespace regroup
