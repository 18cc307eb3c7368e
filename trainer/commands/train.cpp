#include "trainer/commands/commands.h"
#include "trainer/run/training_run.h"

namespace regroup {

int train_command(const Options& options, const ProcessGroup& world, const Log& log) {
  TrainingRun run(options, world, log);
  log.info("configuration:");
  for (const auto& [name, value] : run.options().resolved) log.info("  {} = {}", name, value);
  return run.run();
}

}  // namespace regroup
