#include <cstdio>
#include <optional>

#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/checkpoint_writer.h"
#include "trainer/commands/commands.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/model_options.h"
#include "trainer/run/parent_conversion.h"
#include "trainer/run/rank_device.h"
#include "trainer/run/run_directory.h"
#include "trainer/run/watchdog.h"

namespace regroup {
namespace {

// The corpus and what is taken of it; none where --corpus was not given.
struct ConversionData {
  std::optional<Corpus> corpus;
  std::optional<Samples> training, heldout;
};

void open_data(const Options& options, const CheckpointSource& source, ConversionData& data) {
  if (options.corpus.empty()) return;
  data.corpus.emplace(options.corpus);
  require_same_vocabulary(source, *data.corpus);
  data.training.emplace(*data.corpus, Split::kTrain, training_samples(options));
  data.heldout.emplace(*data.corpus, Split::kHeldout, heldout_samples(options));
}

// The parent's state with the new model: to train on from it is to train on from the parent.
RunState converted_state(const Options& options, const CheckpointSource& source,
                         const ConversionReport& report) {
  RunState state;
  state.step = state.first_step = source.step.value_or(options.parent_steps);
  if (source.state) {
    state.samples = source.state->samples;
    state.identity = source.state->identity;
  }
  state.parent = source.directory.string();
  state.parent_loss = report.parent_loss;
  state.converted_loss = report.converted_loss;
  state.conversion = to_json(report.provenance);
  state.identity["mode"] = "convert";
  state.identity["model"] = parse_json(to_json(report.target));
  return state;
}

// What lies beside the tensors: the tokenizer is the parent's, or the corpus' that it was trained on.
std::map<std::string, std::string> small_files(const CheckpointSource& source, const ConversionData& data,
                                               const ModelConfig& config) {
  std::map<std::string, std::string> texts = files_to_take_along(source.companions);
  texts["config.json"] = to_json(config);
  if (const auto own = tokenizer_of(source.companions)) {
    texts["tokenizer.model"] = read_text(*own);
  } else if (data.corpus) {
    texts["tokenizer.model"] = read_text(data.corpus->tokenizer_file());
  }
  return texts;
}

// The output, for this job alone; refused where a checkpoint is there.
void take_output(RunDirectory& directory) {
  const auto refuse_a_run = [&directory] {
    if (const auto step = directory.newest()) {
      UserError error("{} has a checkpoint of step {} already; give another --output",
                      directory.path().string(), *step);
      error.set_on_every_rank();
      throw error;
    }
  };
  refuse_a_run();
  directory.take();
  refuse_a_run();  // another job may have had it until now
}

}  // namespace

int convert_command(const Options& asked, const ProcessGroup& world, const Log& log) {
  Watchdog watchdog(world, asked.hang_timeout, log);
  Options options = asked;
  const CheckpointSource source = find_checkpoint(world, options.init_from);
  ModelConfig target;
  ConversionData data;
  Layout layout;
  RunDirectory directory(world, options.output, log);
  world.run_together([&] {
    conversion_options(options);  // known names
    if (source.state) inherit(options, source.state->identity);
    target = uptrained_config(options, source.config);
    validate_conversion(source.config, target);
    layout = complete_layout(options.layout, world.size());
    validate_tensor_parallel(source.config, layout.tensor_parallel);
    validate_tensor_parallel(target, layout.tensor_parallel);
    require_budget_fits(options, source.config, layout.tensor_parallel);
    open_data(options, source, data);
  });
  verify_checkpoint(world, source);
  take_output(directory);
  watchdog.use_board(world, options.output);
  const RankDevice device = open_device(options, world, log);
  const Mesh mesh(world, layout, conversion_groups(options, source.config, target), device.communicators);
  const index_t micro_batch = evaluation_micro_batch(options);
  ParentConversion parent = plan_parent(options, world, *device.backend, mesh, source, target,
                                        {.corpus = data.corpus ? &*data.corpus : nullptr,
                                         .training = data.training ? &*data.training : nullptr,
                                         .heldout = data.heldout ? &*data.heldout : nullptr,
                                         .micro_batch = micro_batch});
  ConversionReport& report = parent.report;
  world.run_together([&] { validate_tensor_parallel(report.target, layout.tensor_parallel); });

  std::optional<ModelRunner> runner;
  std::optional<ParameterStore> alone;  // without a corpus nothing runs
  if (data.heldout) {
    runner.emplace(*device.backend, mesh, report.target,
                   runner_options(options, *data.heldout, micro_batch, /*train=*/false));
  } else {
    alone.emplace(*device.backend, report.target,
                  ParameterStore::Options{.compute = DType::kFloat32,
                                          .tp_rank = mesh.tp_rank(),
                                          .tp_size = mesh.tp_size(),
                                          .gradients = false});
  }
  ParameterStore& store = runner ? runner->parameters() : *alone;
  load_weights(world, source, *device.backend, store, parent.plan);
  if (runner) {
    report.converted_loss =
        evaluate(*runner, mesh, *data.heldout, options.evaluation_samples, micro_batch).mean();
  }
  std::map<std::string, std::string> texts;
  world.run_on(0, [&] { texts = small_files(source, data, report.target); });
  const RunState state = converted_state(options, source, report);
  CheckpointWriter writer(world, layout, *device.backend, directory.checkpoints(),
                          {{.stem = "model", .tensors = sharded_parameters(store)}},
                          {.memory = static_cast<std::uint64_t>(options.save_memory) << 20});
  writer.save(state.step, to_json(state), texts);
  writer.finish();
  world.run_on(0, [&] { write_conversion_report(options.output, report); });
  if (world.rank() == 0) fmt::print("{}", conversion_table(report));
  log.info("{} is written: give it to --init-from or --checkpoint", options.output.string());
  return 0;
}

}  // namespace regroup
