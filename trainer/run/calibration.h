// Calibration: what conversion needs to know of the inputs of a model's attentions.
#pragma once

#include <vector>

#include "trainer/run/moment_probe.h"
#include "trainer/run/output_probe.h"

namespace regroup {

struct CalibrationOptions {
  index_t samples = 256;  // the first ones of the training order; batches x batch size
  // The attentions to measure, as places in attention_sites(), each once: a pass takes 32 d_model^2 bytes of
  // the device for each.
  std::vector<index_t> sites;
};

// Runs the model forward over samples 0 ... of `training`, shared out over data-parallel ranks in the
// runner's micro-batches, and returns the moments of each of the `sites`, whole and the same on every rank.
// Up to rounding they are a function of the model and the samples only. Collective over `world`, the ranks
// of the mesh; errors as MomentProbe.
std::vector<SecondMoments> calibrate(ModelRunner& runner, const Mesh& mesh, const ProcessGroup& world,
                                     const Samples& training, const CalibrationOptions& options);

// The moments of what planned attentions pass on (see OutputProbe), over the same samples. Collective as
// above.
std::vector<OutputMoments> calibrate_outputs(ModelRunner& runner, const Mesh& mesh, const ProcessGroup& world,
                                             const Samples& training, index_t samples,
                                             std::span<const SiteConversion> sites,
                                             std::span<const std::vector<Matrix>> shared);

}  // namespace regroup
