#include "trainer/run/precision.h"

#include <array>

#include "kernels/cpu_level.h"

namespace regroup {

void resolve_precision(Options& options, const ProcessGroup& world) {
  if (options.precision != "auto") return;
  std::array<double, 1> in_hardware = {1};
  if (options.device == "cpu") {
    in_hardware[0] = processor_multiplies_bfloat16(options.cpu_level.value_or(highest_cpu_level())) ? 1 : 0;
  }
  world.all_reduce(in_hardware, ReduceOp::kMin);
  options.given.erase("precision");
  options.precision = in_hardware[0] > 0 ? "bf16" : "fp32";
  set_resolved(options, "precision", options.precision);
}

void keep_precision(Options& options, const std::string& begun) {
  if (options.given.contains("precision")) return;
  options.precision = begun;
  set_resolved(options, "precision", begun);
}

}  // namespace regroup
