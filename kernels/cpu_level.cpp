#include "kernels/cpu_level.h"

#include <array>
#include <string>

#include <fmt/ranges.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

constexpr std::array kNames = {std::pair{CpuLevel::kPortable, std::string_view("portable")},
                               std::pair{CpuLevel::kAvx2, std::string_view("avx2")},
                               std::pair{CpuLevel::kAvx512, std::string_view("avx512")},
                               std::pair{CpuLevel::kAvx512Bf16, std::string_view("avx512_bf16")}};

}  // namespace

std::string_view name_of(CpuLevel level) { return kNames.at(static_cast<std::size_t>(level)).second; }

CpuLevel cpu_level_from_string(std::string_view name) {
  std::vector<std::string> legal;
  for (const auto& [level, known] : kNames) {
    if (known == name) return level;
    legal.emplace_back(known);
  }
  throw UserError("there is no processor level '{}'{}; use one of {}", name,
                  did_you_mean(std::string(name), legal), fmt::join(legal, ", "));
}

std::string_view openblas_core_type(CpuLevel level) {
  switch (level) {
    case CpuLevel::kPortable:
      return "Prescott";  // SSE3, the least it knows of x86-64
    case CpuLevel::kAvx2:
      return "Haswell";
    case CpuLevel::kAvx512:
      return "SkylakeX";
    case CpuLevel::kAvx512Bf16:
      return "Cooperlake";
  }
  throw InternalError("unknown level");
}

}  // namespace regroup
