#include <memory>

#include "kernels/base/error.h"
#include "trainer/commands/commands.h"
#include "trainer/run/training_run.h"

namespace regroup {

int train_command(const Options& options, const ProcessGroup& world, const Log& log) {
  auto run = std::make_unique<TrainingRun>(options, world, log);
  log.info("configuration:");
  for (const auto& [name, value] : run->options().resolved) log.info("  {} = {}", name, value);
  try {
    return run->run();
  } catch (const Error& error) {
    // What this rank alone knows ends the job, and at once: not after the checkpoint that is being written.
    if (!error.on_every_rank() && world.size() > 1) static_cast<void>(run.release());
    throw;
  }
}

}  // namespace regroup
