#include <map>
#include <optional>

#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "trainer/commands/commands.h"
#include "trainer/conversion/expanded_heads.h"
#include "trainer/formats/hugging_face.h"
#include "trainer/formats/streamed_writer.h"
#include "trainer/formats/t5x.h"
#include "trainer/run/logit_check.h"
#include "trainer/run/unfinished_folder.h"
#include "trainer/run/watchdog.h"

namespace regroup {
namespace {

StoredType exported_type(const std::string& name) {
  const std::map<std::string, StoredType> types = {
      {"fp32", StoredType::kF32}, {"bf16", StoredType::kBF16}, {"fp16", StoredType::kF16}};
  return types.at(name);
}

std::vector<StoredTensor> exported_tensors(const ModelConfig& config, StoredType type) {
  std::vector<StoredTensor> tensors;
  for (const ParameterSpec& spec : parameter_table(config)) {
    tensors.push_back({.name = spec.name, .type = type, .shape = spec.shape});
  }
  return tensors;
}

// What lies beside the weights: how the model generates, and its tokenizer.
std::map<std::string, std::string> small_files(const std::filesystem::path& companions) {
  std::map<std::string, std::string> texts = files_to_take_along(companions);
  texts.emplace("generation_config.json", generation_config_text());
  if (const auto tokenizer = tokenizer_of(companions)) {
    texts["spiece.model"] = read_text(*tokenizer);
    if (!texts.contains("tokenizer_config.json")) {
      texts["tokenizer_config.json"] = tokenizer_config_text(Tokenizer(*tokenizer).holds_sentinels());
    }
  }
  return texts;
}

using ReadTensorSlice =
    std::function<void(const std::string& name, int dim, index_t begin, index_t end, const Tensor& out)>;

// Slices of the checkpoint's tensors, or of those of its expanded model. `reader` outlives it.
ReadTensorSlice slices_of(const CheckpointReader& reader, const ModelConfig& config, bool expand) {
  if (expand) {
    return [expanding = ExpandedReader(reader, config)](const std::string& name, int dim, index_t begin,
                                                        index_t end, const Tensor& out) {
      expanding.read(name, dim, begin, end, out);
    };
  }
  return [&reader](const std::string& name, int dim, index_t begin, index_t end, const Tensor& out) {
    reader.read(name, dim, begin, end, out);
  };
}

void write_hugging_face(const ProcessGroup& world, const CheckpointSource& source, bool expand,
                        StoredType type, const std::filesystem::path& folder) {
  const ModelConfig config = expand ? expanded(source.config) : source.config;
  std::optional<CheckpointReader> reader;
  world.run_together([&] { reader.emplace(source.directory); });
  const ReadTensorSlice slices = slices_of(*reader, source.config, expand);
  write_streamed(world, folder, "model", exported_tensors(config, type),
                 [&](const std::string& name, index_t begin, index_t end, const Tensor& out) {
                   slices(name, 0, begin, end, out);
                 });
  world.run_on(0, [&] {
    auto texts = small_files(source.companions);
    texts.merge(expand ? stock_model_files(config, type) : compact_model_files(config, type));
    for (const auto& [name, text] : texts) write_text(folder / name, text);
  });
}

// <folder>/checkpoint_<step>, with Adafactor's moments where the checkpoint has them and heads stay as they
// are.
void write_t5x(const ProcessGroup& world, const CheckpointSource& source, bool expand, index_t step,
               const std::filesystem::path& folder) {
  const ModelConfig config = expand ? expanded(source.config) : source.config;
  const std::filesystem::path target = folder / fmt::format("checkpoint_{}", step);
  std::optional<CheckpointReader> model, moments;
  std::vector<T5xTensor> tensors;
  world.run_together([&] {
    model.emplace(source.directory);
    for (const ParameterSpec& spec : parameter_table(config)) tensors.push_back({spec.name, spec.shape});
    if (expand || source.optimizer != "adafactor") return;
    moments.emplace(source.directory, "optimizer");
    for (const StoredTensor* slot : moments->tensors()) tensors.push_back({slot->name, slot->shape});
  });
  world.run_on(0, [&] { regroup::create_directories(target); });
  T5xWriter writer(target, tensors);
  const ReadTensorSlice parameters = slices_of(*model, source.config, expand);
  world.run_together([&] {
    const auto ranks = static_cast<std::size_t>(world.size());
    const auto me = static_cast<std::size_t>(world.rank());
    std::size_t number = 0;  // of the next chunk, counted through all tensors
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::string& name = tensors[i].name;
      const auto read = [&](int dim, index_t begin, index_t end, const Tensor& out) {
        if (model->find(name) == nullptr) {
          moments->read(name, dim, begin, end, out);
        } else {
          parameters(name, dim, begin, end, out);
        }
        if (!all_finite(out.as<float>(), out.numel())) {
          throw UserError("tensor '{}' holds values that are not finite", name);
        }
      };
      for (index_t chunk = 0; chunk < writer.chunks(i); ++chunk) {
        if (number++ % ranks != me) continue;
        world.heartbeat().beat("exporting tensors");
        writer.write(i, chunk, read);
      }
    }
    world.heartbeat().beat("flushing what was exported");
    writer.sync();
  });
  world.run_on(0, [&] {
    writer.write_index(step);
    auto texts = small_files(source.companions);
    texts["config.json"] = to_json(config);
    for (const auto& [name, text] : texts) write_text(folder / name, text);
  });
}

// The layout asked for; where nothing was asked, as many tensor-parallel ranks as can be, since the
// self-check holds the model in fp32.
Layout export_layout(const Options& options, const ModelConfig& config, int ranks) {
  Layout layout = options.layout;
  if (!options.given.contains("tensor-parallel") && !options.given.contains("data-parallel")) {
    const auto fits = [&](int tp) {
      try {
        validate_tensor_parallel(config, tp);
        return ranks % tp == 0;
      } catch (const UserError&) {
        return false;
      }
    };
    layout.tensor_parallel = ranks;
    while (!fits(layout.tensor_parallel)) --layout.tensor_parallel;
  }
  layout = complete_layout(layout, ranks);
  validate_tensor_parallel(config, layout.tensor_parallel);
  return layout;
}

// Fails where what was written computes something else than the checkpoint, rounded as it was.
void compare_with(const std::vector<float>& logits, const ProcessGroup& world, const Log& log,
                  const Layout& layout, const RankDevice& device, const CheckpointSource& written) {
  const LogitDifference found = compare_logits(world, logits, check_logits(world, layout, device, written));
  log.info("self-check: logits of what was written differ by at most {:.3g} (largest logit {:.3g})",
           found.largest, found.magnitude);
  constexpr double kRounding = 1e-5;  // of sums in another order
  world.run_together([&] {
    if (found.largest <= kRounding * std::max(1.0, found.magnitude)) return;
    throw UserError(
        "what was written does not compute what the checkpoint does: logits of up to {:.3g} differ by "
        "{:.3g}; "
        "the export is not made",
        found.magnitude, found.largest);
  });
}

}  // namespace

int export_command(const Options& options, const ProcessGroup& world, const Log& log) {
  const Watchdog watchdog(world, options.hang_timeout, log);
  const CheckpointSource source = find_checkpoint(world, options.checkpoint);
  const bool expand = options.export_format.ends_with("-expanded");
  const bool t5x = options.export_format.starts_with("t5x");
  const StoredType type = exported_type(options.export_type);
  Layout layout;
  world.run_together([&] { layout = export_layout(options, source.config, world.size()); });
  verify_checkpoint(world, source);
  UnfinishedFolder folder(world, options.output);
  const RankDevice device = open_device(options, world, log);
  std::vector<float> logits;  // first: a model that cannot be run is found before anything is written
  if (options.self_check) logits = check_logits(world, layout, device, source, type);
  if (t5x) {
    if (!source.step) {
      log.info("the model does not say how long it was trained: parent-steps = {} is assumed",
               options.parent_steps);
    }
    write_t5x(world, source, expand, source.step.value_or(options.parent_steps), folder.path());
  } else {
    write_hugging_face(world, source, expand, type, folder.path());
  }
  if (options.self_check) {
    compare_with(logits, world, log, layout, device, find_checkpoint(world, folder.path()));
  }
  folder.finish();
  log.info("{} is written as {}, {}", options.output.string(), options.export_format, options.export_type);
  return 0;
}

}  // namespace regroup
