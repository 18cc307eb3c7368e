// Levels of instruction sets. The ops of kernels/cpu are compiled once a level, from the same sources; which
// of them a process runs is chosen when its backend is made. So one program runs on every processor.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace regroup {

// Each level needs what the ones before it need.
enum class CpuLevel : std::uint8_t {
  kPortable,    // what every processor of the architecture has
  kAvx2,        // x86-64 with AVX2, FMA, BMI1 and BMI2
  kAvx512,      // and AVX-512 F, BW, CD, DQ and VL
  kAvx512Bf16,  // and AVX-512 BF16, which multiplies bfloat16
};

// "portable", "avx2", "avx512", "avx512_bf16".
std::string_view name_of(CpuLevel level);
// Of the name; UserError for any other text.
CpuLevel cpu_level_from_string(std::string_view name);

// The levels that this program has and this processor runs, lowest first.
const std::vector<CpuLevel>& usable_cpu_levels();
// The last of them.
CpuLevel highest_cpu_level();

// Whether products of bfloat16 are done in hardware at this usable level, as far as limit_cpu_level() allows.
bool processor_multiplies_bfloat16(CpuLevel level);

// Keeps oneDNN from instructions above `level` in this process. UserError where this processor lacks the
// level; InternalError where oneDNN has computed something already and it is too late.
void limit_cpu_level(CpuLevel level);
// The value of OPENBLAS_CORETYPE that keeps OpenBLAS from instructions above `level`. OpenBLAS reads it when
// it is loaded.
std::string_view openblas_core_type(CpuLevel level);

}  // namespace regroup
