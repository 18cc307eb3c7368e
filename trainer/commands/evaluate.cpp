#include <cmath>
#include <cstdio>
#include <optional>

#include "trainer/commands/commands.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/model_options.h"
#include "trainer/run/progress.h"
#include "trainer/run/rank_device.h"
#include "trainer/run/watchdog.h"

namespace regroup {

int evaluate_command(const Options& asked, const ProcessGroup& world, const Log& log) {
  const Watchdog watchdog(world, asked.hang_timeout, log);
  Options options = asked;
  const CheckpointSource source = find_checkpoint(world, options.checkpoint);
  const ModelConfig& config = source.config;
  std::optional<Corpus> corpus;
  std::optional<Samples> samples;
  Layout layout;
  world.run_together([&] {
    if (source.state) inherit(options, source.state->identity);  // measured as it was trained
    corpus.emplace(options.corpus);
    samples.emplace(*corpus, Split::kHeldout, heldout_samples(options));
    require_same_vocabulary(source, *corpus);
    layout = complete_layout(options.layout, world.size());
    validate_tensor_parallel(config, layout.tensor_parallel);
  });
  verify_checkpoint(world, source);
  const RankDevice device = open_device(options, world, log);
  const Mesh mesh(world, layout, config.all_kv_groups(), device.communicators);
  const index_t micro_batch = evaluation_micro_batch(options);
  ModelRunner runner(*device.backend, mesh, config,
                     runner_options(options, *samples, micro_batch, /*train=*/false));
  load_weights(world, source, *device.backend, runner.parameters());
  const LossSums sums = evaluate(runner, mesh, *samples, options.evaluation_samples, micro_batch);
  log.info("{}: {} of {} key/value groups{}, {} data-parallel x {} tensor-parallel ranks",
           source.directory.string(), config.kv_groups, config.num_heads,
           config.uneven() ? " on average" : "", layout.data_parallel, layout.tensor_parallel);
  if (world.rank() == 0) {
    fmt::print("held-out loss {:.6f}  perplexity {:.3f}  targets {}\n", sums.mean(), std::exp(sums.mean()),
               format_count(static_cast<std::int64_t>(sums.targets)));
  }
  return 0;
}

}  // namespace regroup
