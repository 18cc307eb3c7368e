#include <map>
#include <optional>

#include "kernels/base/file.h"
#include "trainer/checkpoint/hugging_face.h"
#include "trainer/checkpoint/streamed_writer.h"
#include "trainer/checkpoint/t5x.h"
#include "trainer/commands/commands.h"
#include "trainer/conversion/expanded_heads.h"
#include "trainer/run/logit_check.h"
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

// What the model comes with: its tokenizer and how it generates.
std::map<std::string, std::string> companions_of(const std::filesystem::path& source) {
  constexpr std::uint64_t kLimit = std::uint64_t{64} << 20;
  std::map<std::string, std::string> texts = {{"generation_config.json", generation_config_text()}};
  for (const char* name : {"generation_config.json", "spiece.model", "tokenizer.json",
                           "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}) {
    if (std::filesystem::exists(source / name)) texts[name] = read_text(source / name, kLimit);
  }
  if (const auto own = tokenizer_of(source)) texts.emplace("spiece.model", read_text(*own, kLimit));
  if (texts.contains("spiece.model")) texts.emplace("tokenizer_config.json", tokenizer_config_text());
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
    auto texts = companions_of(source.companions);
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
    auto texts = companions_of(source.companions);
    texts["config.json"] = to_json(config);
    for (const auto& [name, text] : texts) write_text(folder / name, text);
  });
}

// Fails where the logits differ by more than rounding to `type` explains.
void check_export(const Options& options, const ProcessGroup& world, const Log& log, const Layout& layout,
                  const CheckpointSource& source, const std::filesystem::path& folder) {
  const RankDevice device = open_device(options, world, log);
  const LogitDifference found = compare_logits(world, layout, device, source, find_checkpoint(world, folder));
  log.info("self-check: logits of what was written differ by at most {:.3g} (largest logit {:.3g})",
           found.largest, found.magnitude);
  const double rounding = options.export_type == "fp32" ? 1e-5 : options.export_type == "fp16" ? 2e-2 : 1e-1;
  if (found.largest <= rounding * std::max(1.0, found.magnitude)) return;
  throw UserError(
      "{} does not compute what {} does: logits of up to {:.3g} differ by {:.3g}; the export is not made",
      folder.string(), source.directory.string(), found.magnitude, found.largest);
}

}  // namespace

int export_command(const Options& options, const ProcessGroup& world, const Log& log) {
  const Watchdog watchdog(world, options.hang_timeout, log);
  const CheckpointSource source = find_checkpoint(world, options.checkpoint);
  const bool expand = options.export_format.ends_with("-expanded");
  Layout layout;
  std::filesystem::path folder = options.output;
  folder += ".partial";
  world.run_together([&] {
    layout = complete_layout(options.layout, world.size());
    validate_tensor_parallel(source.config, layout.tensor_parallel);
    if (std::filesystem::exists(options.output)) {
      throw UserError("{} is there already; give another --output", options.output.string());
    }
  });
  verify_checkpoint(world, source);
  world.run_on(0, [&] {
    remove_tree(folder);
    regroup::create_directories(folder);
  });
  if (options.export_format.starts_with("t5x")) {
    write_t5x(world, source, expand, source.step.value_or(options.parent_steps), folder);
  } else {
    write_hugging_face(world, source, expand, exported_type(options.export_type), folder);
  }
  if (options.self_check) check_export(options, world, log, layout, source, folder);
  world.run_on(0, [&] {
    sync_to_disk(folder);
    rename_durably(folder, options.output);
  });
  log.info("{} is written as {}, {}", options.output.string(), options.export_format, options.export_type);
  return 0;
}

}  // namespace regroup
