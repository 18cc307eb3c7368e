#include "trainer/run/checkpoint_source.h"

#include <set>
#include <sstream>

#include <fmt/ranges.h>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/run/host_tensors.h"
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

namespace {

// Every rank knows of its own slices.
void refuse_not_finite(const ProcessGroup& world, const CheckpointSource& source, const std::string& mine) {
  std::set<std::string> names;
  for (const std::string& text : world.all_gather(mine)) {
    std::istringstream lines(text);
    for (std::string name; std::getline(lines, name);) names.insert(name);
  }
  if (names.empty()) return;
  world.run_together([&] {
    throw UserError("{}: {} tensors hold values that are not finite: {}", source.directory.string(),
                    names.size(), fmt::join(names, ", "));
  });
}

}  // namespace

void load_weights(const ProcessGroup& world, const CheckpointSource& source, Backend& backend,
                  ParameterStore& store, const ConversionPlan& plan) {
  std::string not_finite;  // names, a line each
  world.run_together([&] {
    const CheckpointReader reader(source.directory);
    const ConvertingReader converting(reader, source.config, store.config(), plan);
    fill_from_host(backend, sharded_parameters(store), [&](const ShardedTensor& tensor) {
      world.heartbeat().beat("reading the weights");
      converting.read(tensor);
      if (tensor.local.dtype == DType::kFloat32 &&
          !all_finite(tensor.local.as<float>(), tensor.local.numel())) {
        not_finite += tensor.name + '\n';
      }
    });
  });
  refuse_not_finite(world, source, not_finite);
  store.refresh_weights();
}

std::optional<std::filesystem::path> tokenizer_of(const std::filesystem::path& directory) {
  for (const char* name : {"tokenizer.model", "spiece.model"}) {
    if (std::filesystem::is_regular_file(directory / name)) return directory / name;
  }
  return std::nullopt;
}

std::map<std::string, std::string> files_to_take_along(const std::filesystem::path& directory) {
  constexpr const char* kName = "generation_config.json";
  if (!std::filesystem::is_regular_file(directory / kName)) return {};
  return {{kName, read_text(directory / kName, 1 << 20)}};
}

void require_same_vocabulary(const CheckpointSource& source, const Corpus& corpus) {
  if (source.config.vocab_size != corpus.vocab_size()) {
    throw UserError(
        "the model {} has a vocabulary of {}, the corpus {} one of {}: they were made with different "
        "tokenizers",
        source.directory.string(), source.config.vocab_size, corpus.folder().string(), corpus.vocab_size());
  }
  const std::optional<std::filesystem::path> tokenizer = tokenizer_of(source.directory);
  if (!tokenizer || checksum_file(*tokenizer) == corpus.manifest().tokenizer_checksum) return;
  throw UserError(
      "the corpus {} was tokenized with another vocabulary than {}: prepare it with --tokenizer {}",
      corpus.folder().string(), source.directory.string(), tokenizer->string());
}

}  // namespace regroup
