#include "trainer/run/parent_conversion.h"

#include <chrono>
#include <limits>
#include <optional>

#include "trainer/run/calibration.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/model_options.h"

namespace regroup {

ConversionOptions conversion_options(const Options& options) {
  return {.pooling = pooling_from_string(options.pooling),
          .grouping = options.grouping == "similarity" ? Grouping::kSimilarity : Grouping::kPosition,
          .budget = options.kv_budget == "uneven" ? Budget::kUneven : Budget::kEven,
          .seed = options.seed};
}

ParentConversion plan_parent(const Options& options, const ProcessGroup& world, Backend& backend,
                             const Mesh& mesh, const CheckpointSource& source, const ModelConfig& target,
                             const ParentData& data) {
  ParentConversion result{.parent_loss = std::numeric_limits<double>::quiet_NaN()};
  std::optional<ModelRunner> runner;
  if (data.training != nullptr || data.heldout != nullptr) {
    const Samples& samples = data.heldout != nullptr ? *data.heldout : *data.training;
    runner.emplace(backend, mesh, source.config,
                   runner_options(options, samples, data.micro_batch, /*train=*/false));
    load_weights(world, source, *runner);
  }
  if (data.heldout != nullptr) {
    result.parent_loss =
        evaluate(*runner, mesh, *data.heldout, options.evaluation_samples, data.micro_batch).mean();
  }
  const auto began = std::chrono::steady_clock::now();
  Calibration calibration;
  if (data.training != nullptr) {
    constexpr index_t kBytesPerMoment = 32;  // of a site's sums and of what is made of them
    const index_t site_bytes = kBytesPerMoment * source.config.d_model * source.config.d_model;
    calibration.sites_at_once = options.calibration_memory > 0
                                    ? (options.calibration_memory << 20) / site_bytes
                                    : std::numeric_limits<index_t>::max();
    calibration.measure = [&](std::span<const index_t> sites) {
      return calibrate(*runner, mesh, world, *data.training,
                       {.samples = options.calibration_batches * options.batch_size,
                        .sites = std::vector<index_t>(sites.begin(), sites.end())});
    };
  }
  std::optional<CheckpointReader> reader;
  world.run_together([&] { reader.emplace(source.directory); });
  result.plan =
      plan_conversion(world, *reader, source.config, target, conversion_options(options), calibration);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  return result;
}

}  // namespace regroup
