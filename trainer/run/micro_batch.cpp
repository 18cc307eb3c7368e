#include "trainer/run/micro_batch.h"

#include <algorithm>

#include "kernels/plan_backend.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/optimizer/adamw.h"

namespace regroup {

index_t training_bytes(const Backend& device, const Mesh& mesh, const ModelConfig& config,
                       const ModelRunner::Options& options, const std::string& optimizer) {
  PlanBackend backend(device);
  const int rank = mesh.dp_rank() * mesh.tp_size() + mesh.tp_rank();
  const Mesh quiet = Mesh::plan(mesh.layout(), rank, config.all_kv_groups());
  ModelRunner runner(backend, quiet, config, options);
  if (optimizer == "adamw") {
    const AdamW state(backend, runner.parameters(), quiet, {});
    return backend.allocated();
  }
  const Adafactor state(backend, runner.parameters(), quiet, {});
  return backend.allocated();
}

index_t fitting_micro_batch(index_t share, index_t most, const std::function<bool(index_t)>& fits) {
  for (index_t divisor = std::min(share, most); divisor > 1; --divisor) {
    if (share % divisor == 0 && fits(divisor)) return divisor;
  }
  return 1;
}

}  // namespace regroup
