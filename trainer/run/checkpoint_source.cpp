#include "trainer/run/checkpoint_source.h"

#include <set>
#include <sstream>

#include <fmt/ranges.h>

#include "kernels/base/file.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/formats/checkpoint_reader.h"
#include "trainer/formats/t5x.h"
#include "trainer/run/model_options.h"

namespace regroup {
namespace {

// Where the files that go with a T5X checkpoint lie: in its directory, or in the one of its run.
std::filesystem::path companions_of(const std::filesystem::path& index) {
  const std::filesystem::path own = index.parent_path();
  const bool of_run = own.filename().string().starts_with("checkpoint_");
  const auto has_some = [](const std::filesystem::path& folder) {
    return std::filesystem::exists(folder / "config.json") || tokenizer_of(folder) ||
           !files_to_take_along(folder).empty();
  };
  return of_run && !has_some(own) && has_some(own.parent_path()) ? own.parent_path() : own;
}

// The same file on every rank, whatever is written beside it meanwhile.
std::optional<std::filesystem::path> find_t5x(const ProcessGroup& world, const std::filesystem::path& path) {
  std::string found;
  world.run_on(0, [&] { found = t5x_index(path).value_or("").string(); });
  found = world.broadcast(found);
  if (found.empty()) return std::nullopt;
  return found;
}

CheckpointSource t5x_source(const ProcessGroup& world, const std::filesystem::path& index) {
  const bool in_directory = index.filename() == "checkpoint";
  CheckpointSource source{.directory = in_directory ? index.parent_path() : index};
  world.run_together([&] {
    source.companions = companions_of(index);
    const T5xCheckpoint checkpoint(index);
    const CheckpointReader reader(source.directory, checkpoint.parameters());
    const std::filesystem::path config = source.companions / "config.json";
    source.config = std::filesystem::exists(config)
                        ? model_config_from_json(read_text(config, 1 << 20), config.string())
                        : config_of_shapes(reader.tensors(), index.string());
    reader.require(parameter_table(source.config));
    source.step = checkpoint.step();
    if (checkpoint.has_moments()) source.optimizer = "adafactor";
  });
  return source;
}

// Whose moments a checkpoint of this program holds.
std::string moments_of(const CheckpointSource& source) {
  if (!CheckpointReader::exists(source.directory, "optimizer")) return "";
  return source.state->identity.value("optimizer", "");
}

std::filesystem::path config_of(const CheckpointSource& source) { return source.directory / "config.json"; }

ModelConfig read_config(const CheckpointSource& source) {
  const std::filesystem::path file = config_of(source);
  return model_config_from_json(read_text(file, 1 << 20), file.string());
}

}  // namespace

CheckpointSource read_step(const ProcessGroup& world, const std::filesystem::path& directory) {
  CheckpointSource source{.directory = directory, .companions = directory};
  const nlohmann::json json = step_state(world, directory);
  world.run_together([&] {
    source.state = run_state_from_json(json, (directory / "trainer.json").string());
    source.config = read_config(source);
    source.step = source.state->step;
    source.optimizer = moments_of(source);
  });
  return source;
}

CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path) {
  if (const auto index = find_t5x(world, path)) return t5x_source(world, *index);
  CheckpointSource source{.directory = path};
  const CheckpointStore store(world, path);
  if (const std::optional<index_t> step = store.latest()) source.directory = store.path_of(*step);
  source.companions = source.directory;
  bool is_step = false;
  world.run_together([&] {
    if (!std::filesystem::exists(path)) throw UserError("there is no checkpoint {}", path.string());
    // Ours also where trainer.json is lost: optimizer state tells.
    is_step = std::filesystem::exists(source.directory / "trainer.json") ||
              CheckpointReader::exists(source.directory, "optimizer");
    if (!is_step && !std::filesystem::exists(config_of(source))) {
      throw UserError(
          "{} is neither a run with a complete checkpoint, nor a step directory, nor a T5X checkpoint, nor a "
          "model directory with a config.json",
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
    // Where there are no replicas nobody reads a slice again.
    const Slice& embedding = store.slice(0);
    const bool alone = (embedding.end - embedding.begin) * world.size() == store.config().vocab_size;
    const CheckpointReader reader(source.directory, "model", alone ? Caching::kPast : Caching::kThrough);
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
  constexpr std::uint64_t kLimit = std::uint64_t{64} << 20;
  std::map<std::string, std::string> texts;
  for (const char* name : {"generation_config.json", "tokenizer.json", "tokenizer_config.json",
                           "special_tokens_map.json", "added_tokens.json"}) {
    if (std::filesystem::is_regular_file(directory / name)) texts[name] = read_text(directory / name, kLimit);
  }
  return texts;
}

void require_same_vocabulary(const CheckpointSource& source, const Corpus& corpus) {
  if (source.config.vocab_size != corpus.vocab_size()) {
    throw UserError(
        "the model {} has a vocabulary of {}, the corpus {} one of {}: they were made with different "
        "tokenizers",
        source.directory.string(), source.config.vocab_size, corpus.folder().string(), corpus.vocab_size());
  }
  const std::optional<std::filesystem::path> tokenizer = tokenizer_of(source.companions);
  if (!tokenizer || checksum_file(*tokenizer) == corpus.manifest().tokenizer_checksum) return;
  throw UserError(
      "the corpus {} was tokenized with another vocabulary than {}: prepare it with --tokenizer {}",
      corpus.folder().string(), source.directory.string(), tokenizer->string());
}

}  // namespace regroup
