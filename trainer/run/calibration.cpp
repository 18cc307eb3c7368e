#include "trainer/run/calibration.h"

#include <algorithm>

namespace regroup {
namespace {

// Runs this rank's share of the first samples under the probe.
template <class Probe>
void observe(ModelRunner& runner, const Mesh& mesh, const Samples& training, index_t samples, Probe& probe) {
  const index_t begin = samples * mesh.dp_rank() / mesh.dp_size();
  const index_t end = samples * (mesh.dp_rank() + 1) / mesh.dp_size();
  const index_t micro_batch = runner.options().micro_batch;
  Batch batch;
  for (index_t first = begin; first < end; first += micro_batch) {
    make_batch(training, {.first_sample = first, .count = std::min(micro_batch, end - first)}, batch);
    probe.begin(batch);
    runner.observe(batch, probe);
  }
}

}  // namespace

std::vector<SecondMoments> calibrate(ModelRunner& runner, const Mesh& mesh, const ProcessGroup& world,
                                     const Samples& training, const CalibrationOptions& options) {
  MomentProbe probe(runner, mesh, options.sites);
  observe(runner, mesh, training, options.samples, probe);
  return probe.take(world);
}

std::vector<OutputMoments> calibrate_outputs(ModelRunner& runner, const Mesh& mesh, const ProcessGroup& world,
                                             const Samples& training, index_t samples,
                                             std::span<const SiteConversion> sites,
                                             std::span<const std::vector<Matrix>> shared) {
  OutputProbe probe(runner, mesh, sites, shared);
  observe(runner, mesh, training, samples, probe);
  return probe.take(world);
}

}  // namespace regroup
