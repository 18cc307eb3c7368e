// Everything a run can be told, by command line and configuration files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu_level.h"
#include "kernels/dtype.h"
#include "parallel/mesh.h"

namespace regroup {

enum class Mode {
  kHelp,
  kVersion,
  kTrainTokenizer,
  kPrepareData,
  kPretrain,
  kUptrain,
  kEvaluate,
  kConvert,
  kExport,
  kReport,
  kDoctor
};

// Defaults are those of `trainer --help`; every member is the option of the same name with '-' for '_'.
struct Options {
  Mode mode = Mode::kHelp;

  // Run.
  std::filesystem::path run;  // directory of checkpoints, metrics and plots
  std::uint64_t seed = 0;
  std::string device = "cpu";         // or cuda
  std::optional<CpuLevel> cpu_level;  // REGROUP_CPU_LEVEL; none: the highest of the processor
  int threads = 0;  // of each rank; 0: OMP_NUM_THREADS, or this rank's share of the host's cores
  std::string collectives = "auto";  // or nccl, host: how tensors of GPUs travel
  double hang_timeout = 600;         // seconds without progress; 0: for ever
  index_t restart_budget = 5;        // starts in a row without a new checkpoint; 0: any number
  bool deterministic = false;        // fixed algorithms in place of measured ones

  // Model. Anything set here replaces the value of the named size.
  std::string model = "small";
  std::optional<index_t> d_model, d_kv, d_ff, heads, layers, decoder_layers;
  std::optional<index_t> kv_groups, encoder_kv_groups;
  double dropout = 0;

  // Layout.
  Layout layout{.data_parallel = 0, .tensor_parallel = 1};  // data_parallel 0: all ranks / tensor_parallel
  std::string precision = "auto";                           // or bf16, fp32; auto until resolve_precision()
  bool recompute = false;

  // Data.
  std::filesystem::path corpus;
  bool verify_corpus = true;
  index_t inputs_length = 512;
  double noise_density = 0.15;
  double mean_span = 3.0;
  int workers = 1;

  // Training.
  index_t steps = 0;         // pretraining
  index_t batch_size = 128;  // sequences of one optimizer step, over all ranks
  index_t micro_batch = 0;   // sequences of one forward and backward of a rank; 0: those that suit the device
  std::string optimizer = "adafactor";
  std::string schedule = "rsqrt";
  std::optional<double> learning_rate;  // the schedule's base; rsqrt 1, else 1e-3
  index_t warmup = 10000;
  double weight_decay = 0;
  bool scale_by_rms = true;
  double max_gradient_norm = 0;
  double z_loss = 1e-4;
  std::string on_divergence =
      "stop";                  // or skip, rollback: a step whose loss or gradient is not finite, or a spike
  double spike_threshold = 0;  // standard deviations above the recent mean; 0: no spikes

  // Uptraining.
  std::filesystem::path init_from;  // a run, a step directory, a transformers checkpoint
  double alpha = 0.05;              // share of the parent's steps
  double until_recovered = 0;       // share of what the conversion cost at which it ends early; 0: none
  bool parent_moments = true;       // go on with its optimizer state where it has one
  index_t parent_steps = 1000000;   // of a parent that does not say (public T5 1.1: 1,000,000)
  std::string pooling = "mean";
  std::string grouping = "position";  // or similarity
  std::string kv_budget = "even";     // or uneven
  index_t calibration_batches = 8;    // of batch-size sequences
  index_t calibration_memory = 4096;  // MiB of a rank for moments; 0: those of all attentions at once

  // Checkpoints and evaluation.
  index_t save_every = 1000, keep_last = 2, keep_every = 0;
  bool background_save = true;
  index_t save_memory = 0;  // MiB of a rank for what is being written; 0: its whole share of a checkpoint
  index_t evaluate_every = 1000, evaluation_samples = 256;
  index_t progress_every = 10;
  std::filesystem::path checkpoint;  // --evaluate, --export: of what

  // Export.
  std::string export_format;         // the value of --export: hf, hf-expanded, t5x, t5x-expanded
  std::string export_type = "fp32";  // or bf16, fp16
  bool self_check = true;            // compare logits with the checkpoint's

  // Text to corpus.
  std::vector<std::filesystem::path> inputs;
  std::filesystem::path output, tokenizer;
  index_t vocab_pieces = 32000;
  index_t vocab_sentences = 1000000;
  double heldout_fraction = 0.005;
  index_t shard_tokens = index_t{64} << 20;
  std::string document = "file";
  double max_bad_fraction = 0.001;
  bool overwrite = false;

  // --report: the runs to compare.
  std::vector<std::filesystem::path> runs;

  // The names that were given, by command line or file.
  std::set<std::string> given;

  // Name and value of everything that counts in this mode, in the order of --help: what a configuration file
  // needs to say to get the same run. Printed at the start and saved with the run.
  std::vector<std::pair<std::string, std::string>> resolved;
};

// Reads the command line and the --config files it names (a later file wins over an earlier one, the command
// line over all). Where --pretrain or --uptrain is given none of --config, --corpus, --model and --init-from,
// the embedded configs/quickstart.cfg is read first. UserError for unknown options (naming the nearest),
// malformed values, several modes, and for a mode that lacks what it needs; file and line where it came from
// a file.
Options parse_options(const std::vector<std::string>& arguments);

// What REGROUP_CPU_LEVEL asks for; none where it is not set or empty. UserError where that is no level.
std::optional<CpuLevel> requested_cpu_level();
// Sets the environment of OpenBLAS for this level unless the user has. OpenBLAS reads it when the program
// starts. Whether it was set now.
bool limit_openblas(CpuLevel level);

// Has `resolved` say this value of an option.
void set_resolved(Options& options, const std::string& name, const std::string& value);

// The pairs of a configuration file: `key = value` lines, '#' comments, and [mode] sections, whose pairs
// count for that mode only. `where` names the text in errors. Pure; UserError with the line.
struct ConfigLine {
  std::string section, key, value;
  int line = 0;
};
std::vector<ConfigLine> parse_config(const std::string& text, const std::string& where);

// The text of `trainer --help`.
std::string help();

// The threads this rank should use: `requested`, else OMP_NUM_THREADS, else the host's cores (those this
// process may run on) over the ranks on it.
int threads_of(int requested, int ranks_on_host);

}  // namespace regroup
