// The builds of CpuBackend: one for each level, see kernels/CMakeLists.txt.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cpu_level.h"

namespace regroup {

// CpuBackend compiled for `level`, which is one of usable_cpu_levels().
std::unique_ptr<Backend> make_cpu_backend(CpuLevel level, int threads);

// The same for one level each. The code behind them must run only where the level is usable.
std::unique_ptr<Backend> make_portable_backend(int threads);
std::unique_ptr<Backend> make_avx2_backend(int threads);
std::unique_ptr<Backend> make_avx512_backend(int threads);
std::unique_ptr<Backend> make_avx512_bf16_backend(int threads);

}  // namespace regroup
