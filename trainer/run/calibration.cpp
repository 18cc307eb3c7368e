#include "trainer/run/calibration.h"

#include <algorithm>

namespace regroup {

std::vector<SecondMoments> calibrate(ModelRunner& runner, const Mesh& mesh, const ProcessGroup& world,
                                     const Samples& training, const CalibrationOptions& options) {
  MomentProbe probe(runner, mesh, options.sites);
  const index_t begin = options.samples * mesh.dp_rank() / mesh.dp_size();
  const index_t end = options.samples * (mesh.dp_rank() + 1) / mesh.dp_size();
  const index_t micro_batch = runner.options().micro_batch;
  Batch batch;
  for (index_t first = begin; first < end; first += micro_batch) {
    make_batch(training, {.first_sample = first, .count = std::min(micro_batch, end - first)}, batch);
    probe.begin(batch);
    runner.observe(batch, probe);
  }
  return probe.take(world);
}

}  // namespace regroup
