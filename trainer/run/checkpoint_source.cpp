#include "trainer/run/checkpoint_source.h"

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/run/model_options.h"

namespace regroup {

CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path) {
  CheckpointSource source{.directory = path};
  const CheckpointStore store(world, path);
  if (const std::optional<index_t> step = store.latest()) source.directory = store.path_of(*step);
  const std::filesystem::path config = source.directory / "config.json";
  const std::filesystem::path state = source.directory / "trainer.json";
  bool is_step = false;
  world.run_together([&] {
    if (!std::filesystem::exists(path)) throw UserError("there is no checkpoint {}", path.string());
    // Ours also where trainer.json is lost: optimizer state tells.
    is_step = std::filesystem::exists(state) || CheckpointReader::exists(source.directory, "optimizer");
    if (!is_step && !std::filesystem::exists(config)) {
      throw UserError(
          "{} is neither a run with a complete checkpoint, nor a step directory, nor a model directory with "
          "a "
          "config.json",
          path.string());
    }
  });
  if (is_step) {
    verify_step(world, source.directory, Verification::kSmall);
    const nlohmann::json json = step_state(world, source.directory);
    world.run_together([&] { source.state = run_state_from_json(json, state.string()); });
  }
  world.run_together([&] {
    source.config = model_config_from_json(read_text(config, 1 << 20), config.string());
    CheckpointReader(source.directory).require(parameter_table(source.config));
  });
  return source;
}

void verify_checkpoint(const ProcessGroup& world, const CheckpointSource& source) {
  if (source.state) verify_step(world, source.directory);
}

void load_weights(const ProcessGroup& world, const CheckpointSource& source, Backend& backend,
                  ParameterStore& store, const ConversionPlan& plan) {
  world.run_together([&] {
    const CheckpointReader reader(source.directory);
    const ConvertingReader converting(reader, source.config, store.config(), plan);
    fill_from_host(backend, sharded_parameters(store), [&](const ShardedTensor& tensor) {
      world.heartbeat().beat("reading the weights");
      converting.read(tensor);
    });
  });
  store.refresh_weights();
}

void require_same_vocabulary(const CheckpointSource& source, const Corpus& corpus) {
  if (source.config.vocab_size != corpus.vocab_size()) {
    throw UserError(
        "the model {} has a vocabulary of {}, the corpus {} one of {}: they were made with different "
        "tokenizers",
        source.directory.string(), source.config.vocab_size, corpus.folder().string(), corpus.vocab_size());
  }
  const std::filesystem::path tokenizer = source.directory / "tokenizer.model";
  if (!std::filesystem::exists(tokenizer) ||
      checksum_file(tokenizer) == corpus.manifest().tokenizer_checksum) {
    return;
  }
  throw UserError(
      "the corpus {} was tokenized with another vocabulary than {}: prepare it with --tokenizer {}",
      corpus.folder().string(), source.directory.string(), tokenizer.string());
}

}  // namespace regroup
