#include "trainer/run/checkpoint_source.h"

#include "kernels/base/file.h"
#include "trainer/checkpoint/step_directory.h"

namespace regroup {

CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path) {
  CheckpointSource source{.directory = path};
  // A step directory is looked at through its run, which knows how to verify it.
  const std::string name = path.filename().string();
  const bool is_step = name.starts_with("step-") && path.parent_path().filename() == "checkpoints";
  const std::filesystem::path run = is_step ? path.parent_path().parent_path() : path;
  const CheckpointStore store(world, run);
  std::optional<index_t> step;
  for (const index_t candidate : store.steps()) {
    if (!is_step || store.path_of(candidate).filename() == path.filename()) step = candidate;
  }
  if (step) {
    store.verify(*step);
    source.directory = store.path_of(*step);
    source.state = run_state_from_json(store.state(*step), (source.directory / "trainer.json").string());
  } else {
    world.run_together([&] {
      if (!std::filesystem::exists(path)) throw UserError("there is no checkpoint {}", path.string());
      if (!std::filesystem::exists(path / "config.json")) {
        throw UserError(
            "{} is neither a run with a complete checkpoint, nor a step directory, nor a model directory "
            "with a config.json",
            path.string());
      }
    });
  }
  const std::filesystem::path config = source.directory / "config.json";
  world.run_together(
      [&] { source.config = model_config_from_json(read_text(config, 1 << 20), config.string()); });
  return source;
}

}  // namespace regroup
