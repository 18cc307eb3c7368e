#include "trainer/run/checkpoint_source.h"

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/run/model_options.h"

namespace regroup {
namespace {

std::filesystem::path config_of(const CheckpointSource& source) { return source.directory / "config.json"; }

ModelConfig read_config(const CheckpointSource& source) {
  const std::filesystem::path file = config_of(source);
  return model_config_from_json(read_text(file, 1 << 20), file.string());
}

}  // namespace

CheckpointSource read_step(const ProcessGroup& world, const std::filesystem::path& directory) {
  CheckpointSource source{.directory = directory};
  const nlohmann::json json = step_state(world, directory);
  world.run_together([&] {
    source.state = run_state_from_json(json, (directory / "trainer.json").string());
    source.config = read_config(source);
  });
  return source;
}

CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path) {
  CheckpointSource source{.directory = path};
  const CheckpointStore store(world, path);
  if (const std::optional<index_t> step = store.latest()) source.directory = store.path_of(*step);
  bool is_step = false;
  world.run_together([&] {
    if (!std::filesystem::exists(path)) throw UserError("there is no checkpoint {}", path.string());
    // Ours also where trainer.json is lost: optimizer state tells.
    is_step = std::filesystem::exists(source.directory / "trainer.json") ||
              CheckpointReader::exists(source.directory, "optimizer");
    if (!is_step && !std::filesystem::exists(config_of(source))) {
      throw UserError(
          "{} is neither a run with a complete checkpoint, nor a step directory, nor a model directory with "
          "a "
          "config.json",
          path.string());
    }
  });
  if (is_step) {
    verify_step(world, source.directory, Verification::kSmall);
    source = read_step(world, source.directory);
  }
  world.run_together([&] {
    if (!is_step) source.config = read_config(source);
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
