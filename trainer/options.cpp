#include "trainer/options.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <sched.h>
#include <set>
#include <sstream>

#include <boost/program_options.hpp>
#include <fmt/ranges.h>

#include "kernels/base/file.h"
#include "trainer/option_table.h"
#include "trainer/quickstart_config.h"

namespace regroup {
namespace {

namespace po = boost::program_options;

// Options that say nothing in a mode that trains.
bool is_idle(const std::string& name, Mode mode) {
  static const std::set<std::string> text = {"input",
                                             "output",
                                             "tokenizer",
                                             "vocab-pieces",
                                             "vocab-sentences",
                                             "heldout-fraction",
                                             "shard-tokens",
                                             "document",
                                             "max-bad-fraction",
                                             "overwrite",
                                             "runs",
                                             "export-type",
                                             "self-check",
                                             "checkpoint"};
  static const std::set<std::string> pretraining = {
      "init-from", "alpha",     "parent-steps",        "parent-moments",     "pooling",
      "grouping",  "kv-budget", "calibration-batches", "calibration-memory", "until-recovered"};
  static const std::set<std::string> uptraining = {"model", "steps"};
  return text.contains(name) || (mode == Mode::kPretrain && pretraining.contains(name)) ||
         (mode == Mode::kUptrain && uptraining.contains(name));
}

std::vector<std::string> names_of(const po::options_description& options) {
  std::vector<std::string> names;
  for (const auto& option : options.options()) names.push_back(option->long_name());
  return names;
}

std::string without_dashes(std::string name) {
  name.erase(0, std::min(name.find_first_not_of('-'), name.size()));
  return name.substr(0, name.find('='));
}

// Boost's complaint as one line of ours; `where` is "" for the command line.
[[noreturn]] void explain(const std::exception& error, const po::options_description& all,
                          const std::string& where) {
  const std::string prefix = where.empty() ? "" : where + ": ";
  if (const auto* unknown = dynamic_cast<const po::unknown_option*>(&error)) {
    const std::string name = without_dashes(unknown->get_option_name());
    throw UserError("{}there is no option '{}'{}; --help lists them all", prefix, name,
                    did_you_mean(name, names_of(all)));
  }
  if (const auto* invalid = dynamic_cast<const po::validation_error*>(&error)) {
    throw UserError("{}{}", prefix, invalid->what());
  }
  throw UserError("{}{}", prefix, error.what());
}

// Stores one option of a configuration file.
void store_line(const ConfigLine& line, const std::string& where, const po::options_description& all,
                po::variables_map& values) {
  const std::string place = fmt::format("{}:{}", where, line.line);
  if (line.key == "config") throw UserError("{}: a configuration file cannot name another one", place);
  for (const auto& [name, mode] : modes()) {
    if (line.key == name) throw UserError("{}: the mode --{} belongs on the command line", place, name);
  }
  try {
    po::parsed_options parsed(&all);
    const po::option_description* found = all.find_nothrow(line.key, /*approx=*/false);
    if (found == nullptr) throw po::unknown_option(line.key);
    std::istringstream one(fmt::format("{} = {}\n", line.key, line.value));
    po::variables_map trial;  // checks the value by itself, so that the error has this line
    po::store(po::parse_config_file(one, all), trial);
    one = std::istringstream(fmt::format("{} = {}\n", line.key, line.value));
    po::store(po::parse_config_file(one, all), values);
  } catch (const std::exception& error) {
    explain(error, all, place);
  }
}

Mode mode_of(const po::variables_map& values) {
  std::vector<std::string> given;
  Mode mode = Mode::kHelp;
  for (const auto& [name, candidate] : modes()) {
    if (values.count(name) == 0) continue;
    given.push_back("--" + name);
    mode = candidate;
  }
  if (given.empty()) {
    throw UserError(
        "no mode is given; say --pretrain, --uptrain, --convert, --evaluate, --export, --prepare-data, "
        "--train-tokenizer, "
        "--report, --doctor or --help");
  }
  if (given.size() > 1)
    throw UserError("{} cannot be given together: one mode a run", fmt::join(given, " and "));
  return mode;
}

void require(bool given, const char* mode, const char* option, const char* what) {
  if (!given) throw UserError("--{} needs --{}: {}", mode, option, what);
}

void require_at_least(const char* option, index_t value, index_t least) {
  if (value < least) throw UserError("{} = {}; it must be at least {}", option, value, least);
}

// Beyond these a number is a slip of the finger, and would ask for more memory than there is.
constexpr index_t kMostSequences = index_t{1} << 24;
constexpr index_t kMostPieces = index_t{1} << 24;

void require_at_most(const char* option, index_t value, index_t most) {
  if (value > most) throw UserError("{} = {}; at most {} is possible", option, value, most);
}

void require_share(const char* option, double value) {
  if (!(value >= 0 && value <= 1)) throw UserError("{} = {}; it is a share, from 0 to 1", option, value);
}

void require_finite(const char* option, double value) {
  if (!std::isfinite(value) || value < 0)
    throw UserError("{} = {}; it must be a number, and not negative", option, value);
}

void require_one_of(const char* option, const std::string& value, const std::vector<std::string>& legal) {
  if (std::find(legal.begin(), legal.end(), value) == legal.end()) {
    throw UserError("{} = {}{}; use one of {}", option, value, did_you_mean(value, legal),
                    fmt::join(legal, ", "));
  }
}

void validate_until_recovered(const Options& o) {
  if (!(o.until_recovered >= 0 && o.until_recovered <= 1)) {
    throw UserError(
        "until-recovered = {}; it is a share of what the conversion cost, above 0 and at most 1, such as "
        "0.99 (0: train for all of alpha)",
        o.until_recovered);
  }
  if (o.until_recovered == 0) return;
  if (o.mode != Mode::kUptrain) {
    throw UserError(
        "until-recovered = {} is for --uptrain only; in a configuration file it belongs under [uptrain]",
        o.until_recovered);
  }
  if (o.evaluate_every == 0) {
    throw UserError(
        "until-recovered = {} is looked at in held-out evaluations, and evaluate-every = 0 has none on the "
        "way; give --evaluate-every, such as 100",
        o.until_recovered);
  }
}

void validate(const Options& o) {
  require_one_of("device", o.device, {"cpu", "cuda"});
  require_one_of("collectives", o.collectives, {"auto", "nccl", "host"});
  require_one_of("on-divergence", o.on_divergence, {"stop", "skip", "rollback"});
  if (o.collectives == "nccl" && o.device == "cpu") {
    throw UserError("collectives = nccl goes from GPU to GPU: give --device cuda too, or leave it out");
  }
  require_one_of("precision", o.precision, {"auto", "bf16", "fp32"});
  require_one_of("optimizer", o.optimizer, {"adafactor", "adamw"});
  require_one_of("document", o.document, {"file", "line"});
  require_one_of("grouping", o.grouping, {"position", "similarity"});
  require_one_of("kv-budget", o.kv_budget, {"even", "uneven"});
  require_at_least("calibration-batches", o.calibration_batches, 1);
  require_at_most("calibration-batches", o.calibration_batches, kMostSequences);
  require_at_least("calibration-memory", o.calibration_memory, 0);
  require_at_least("threads", o.threads, 0);
  require_finite("hang-timeout", o.hang_timeout);
  require_finite("spike-threshold", o.spike_threshold);
  require_at_least("restart-budget", o.restart_budget, 0);
  require_at_least("save-memory", o.save_memory, 0);
  require_at_least("batch-size", o.batch_size, 1);
  require_at_most("batch-size", o.batch_size, kMostSequences);
  require_at_most("evaluation-samples", o.evaluation_samples, kMostSequences);
  require_at_most("vocab-pieces", o.vocab_pieces, kMostPieces);
  require_share("heldout-fraction", o.heldout_fraction);
  require_share("max-bad-fraction", o.max_bad_fraction);
  require_at_least("micro-batch", o.micro_batch, 0);
  require_at_least("save-every", o.save_every, 1);
  require_at_least("keep-last", o.keep_last, 1);
  require_at_least("evaluate-every", o.evaluate_every, 0);
  require_at_least("evaluation-samples", o.evaluation_samples, 1);
  require_at_least("progress-every", o.progress_every, 1);
  require_at_least("workers", o.workers, 1);
  require_at_least("warmup", o.warmup, 0);
  require_at_least("parent-steps", o.parent_steps, 1);
  require_at_least("keep-every", o.keep_every, 0);
  require_finite("learning-rate", o.learning_rate.value_or(0));
  require_finite("weight-decay", o.weight_decay);
  require_finite("max-gradient-norm", o.max_gradient_norm);
  require_finite("z-loss", o.z_loss);
  require_at_least("vocab-pieces", o.vocab_pieces, 16);
  require_at_least("shard-tokens", o.shard_tokens, 1);
  if (!(o.alpha > 0 && o.alpha <= 100))
    throw UserError("alpha = {}; it is a share of the parent's steps, such as 0.05", o.alpha);
  validate_until_recovered(o);
  switch (o.mode) {
    case Mode::kTrainTokenizer:
      require(!o.inputs.empty(), "train-tokenizer", "input", "the text to learn from");
      require(!o.output.empty(), "train-tokenizer", "output", "the vocabulary file to write");
      return;
    case Mode::kPrepareData:
      require(!o.inputs.empty(), "prepare-data", "input", "the text files or folders");
      require(!o.tokenizer.empty(), "prepare-data", "tokenizer",
              "a SentencePiece model (see --train-tokenizer)");
      require(!o.output.empty(), "prepare-data", "output", "the corpus folder to make");
      return;
    case Mode::kPretrain:
      require(!o.run.empty(), "pretrain", "run", "a directory for checkpoints and metrics");
      require(!o.corpus.empty(), "pretrain", "corpus", "a folder that --prepare-data made");
      require(o.steps > 0, "pretrain", "steps", "how many optimizer steps to train");
      return;
    case Mode::kUptrain:
      require(!o.run.empty(), "uptrain", "run", "a directory for checkpoints and metrics");
      require(!o.corpus.empty(), "uptrain", "corpus", "a folder that --prepare-data made");
      require(!o.init_from.empty(), "uptrain", "init-from", "the parent's checkpoint");
      return;
    case Mode::kEvaluate:
      require(!o.checkpoint.empty(), "evaluate", "checkpoint", "a run or one of its step directories");
      require(!o.corpus.empty(), "evaluate", "corpus", "a folder that --prepare-data made");
      return;
    case Mode::kConvert:
      require(!o.init_from.empty(), "convert", "init-from", "the parent's checkpoint");
      require(!o.output.empty(), "convert", "output", "the run directory to make");
      if (o.pooling == "calibrated") {
        require(!o.corpus.empty(), "convert --pooling calibrated", "corpus",
                "text that shows what the attentions read");
      }
      return;
    case Mode::kExport:
      require_one_of("export", o.export_format, {"hf", "hf-expanded", "t5x", "t5x-expanded"});
      require_one_of("export-type", o.export_type, {"fp32", "bf16", "fp16"});
      if (o.export_format.starts_with("t5x") && o.export_type != "fp32") {
        throw UserError("export-type = {}: T5X keeps its parameters in fp32; leave it out", o.export_type);
      }
      require(!o.checkpoint.empty(), "export", "checkpoint", "a run, a step directory, or another model");
      require(!o.output.empty(), "export", "output", "the folder to make");
      return;
    case Mode::kReport:
      require(!o.runs.empty(), "report", "runs", "the run directories to compare");
      return;
    case Mode::kDoctor:
    case Mode::kHelp:
    case Mode::kVersion:
      return;
  }
}

// The embedded configuration names files that somebody has to make first.
void require_quickstart(const Options& o) {
  const auto require_folder = [](const std::filesystem::path& folder, const char* what, const char* option) {
    if (std::filesystem::is_directory(folder)) return;
    throw UserError("the quickstart's {} {} is not here: ./quickstart makes it; for another one give --{}",
                    what, folder.string(), option);
  };
  require_folder(o.corpus, "corpus", "corpus");
  if (o.mode == Mode::kUptrain) require_folder(o.init_from, "parent", "init-from");
}

std::string text_of(const boost::any& value) {
  if (const auto* v = boost::any_cast<std::string>(&value)) return *v;
  if (const auto* v = boost::any_cast<index_t>(&value)) return fmt::format("{}", *v);
  if (const auto* v = boost::any_cast<std::uint64_t>(&value)) return fmt::format("{}", *v);
  if (const auto* v = boost::any_cast<int>(&value)) return fmt::format("{}", *v);
  if (const auto* v = boost::any_cast<double>(&value)) return fmt::format("{}", *v);
  if (const auto* v = boost::any_cast<bool>(&value)) return *v ? "on" : "off";
  if (const auto* v = boost::any_cast<std::vector<std::string>>(&value))
    return fmt::format("{}", fmt::join(*v, " "));
  throw InternalError("an option has a type that cannot be printed");
}

}  // namespace

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  const po::options_description all = all_options(options);
  po::variables_map values;
  po::options_description hidden;
  hidden.add_options()("word", po::value<std::vector<std::string>>());
  po::options_description everything;
  everything.add(all).add(hidden);
  po::positional_options_description words;
  words.add("word", -1);
  try {
    using Style = po::command_line_style::style_t;
    const int style = Style::unix_style & ~Style::allow_guessing & ~Style::allow_short & ~Style::allow_sticky;
    po::store(po::command_line_parser(arguments).options(everything).positional(words).style(style).run(),
              values);
  } catch (const std::exception& error) {
    explain(error, all, "");
  }
  if (values.count("word") != 0) {
    throw UserError("'{}' is no option: options begin with --, and --help lists them all",
                    values["word"].as<std::vector<std::string>>().front());
  }
  options.mode = mode_of(values);
  const auto mode_name = std::find_if(modes().begin(), modes().end(), [&](const auto& entry) {
                           return entry.second == options.mode;
                         })->first;
  const auto store_config = [&](const std::string& config, const std::string& where) {
    std::vector<ConfigLine> lines = parse_config(config, where);
    // The first stored value of an option stays: what is specific, and what is later in the file, goes first.
    std::stable_partition(lines.begin(), lines.end(),
                          [](const ConfigLine& line) { return line.section.empty(); });
    std::reverse(lines.begin(), lines.end());
    for (const ConfigLine& line : lines) {
      po::variables_map unused;
      const bool applies = line.section.empty() || line.section == mode_name;
      store_line(line, where, all, applies ? values : unused);
    }
  };
  std::vector<std::string> files;
  if (values.count("config") != 0) files = values["config"].as<std::vector<std::string>>();
  std::reverse(files.begin(), files.end());
  for (const std::string& file : files) store_config(read_text(file, 1 << 20), file);
  const bool trains = options.mode == Mode::kPretrain || options.mode == Mode::kUptrain;
  const auto defaulted = [&values](const char* name) {
    return values.count(name) == 0 || values[name].defaulted();
  };
  bool embedded = false;
  if (trains && files.empty() && defaulted("corpus") && defaulted("init-from") && defaulted("model")) {
    store_config(std::string(kQuickstartConfig), "the embedded quickstart.cfg");
    embedded = true;
  }
  try {
    po::notify(values);
  } catch (const std::exception& error) {
    explain(error, all, "");
  }
  validate(options);
  options.cpu_level = requested_cpu_level();
  if (embedded) require_quickstart(options);
  for (const auto& option : all.options()) {
    const std::string& name = option->long_name();
    const bool is_mode =
        std::any_of(modes().begin(), modes().end(), [&](const auto& m) { return m.first == name; });
    if (is_mode || name == "config" || values.count(name) == 0) continue;
    if (!values[name].defaulted()) options.given.insert(name);
    if (trains && is_idle(name, options.mode)) continue;
    options.resolved.emplace_back(name, text_of(values[name].value()));
  }
  return options;
}

std::optional<CpuLevel> requested_cpu_level() {
  const char* const name = std::getenv("REGROUP_CPU_LEVEL");
  if (name == nullptr || *name == '\0') return std::nullopt;
  try {
    return cpu_level_from_string(name);
  } catch (const UserError& error) {
    throw UserError("REGROUP_CPU_LEVEL: {}", error.what());
  }
}

bool limit_openblas(CpuLevel level) {
  constexpr const char* kName = "OPENBLAS_CORETYPE";
  if (std::getenv(kName) != nullptr) return false;
  return setenv(kName, std::string(openblas_core_type(level)).c_str(), /*overwrite=*/0) == 0;
}

void set_resolved(Options& options, const std::string& name, const std::string& value) {
  const auto known = std::find_if(options.resolved.begin(), options.resolved.end(),
                                  [&name](const auto& pair) { return pair.first == name; });
  if (known == options.resolved.end()) {
    options.resolved.emplace_back(name, value);
  } else {
    known->second = value;
  }
}

std::vector<ConfigLine> parse_config(const std::string& text, const std::string& where) {
  const auto trimmed = [](const std::string& part) {
    const std::size_t begin = part.find_first_not_of(" \t\r");
    if (begin == std::string::npos) return std::string();
    return part.substr(begin, part.find_last_not_of(" \t\r") - begin + 1);
  };
  std::vector<ConfigLine> lines;
  std::istringstream stream(text);
  std::string section, raw;
  for (int number = 1; std::getline(stream, raw); ++number) {
    const std::string line = trimmed(raw.substr(0, raw.find('#')));
    if (line.empty()) continue;
    if (line.find('\0') != std::string::npos) throw UserError("{}:{}: not a text file", where, number);
    if (line.front() == '[') {
      section = line.back() == ']' ? trimmed(line.substr(1, line.size() - 2)) : "";
      std::vector<std::string> names;
      for (const auto& [name, mode] : modes()) names.push_back(name);
      if (std::find(names.begin(), names.end(), section) == names.end()) {
        throw UserError("{}:{}: '{}' is no section{}; sections are [pretrain], [uptrain] and the other modes",
                        where, number, line, did_you_mean(section, names));
      }
      continue;
    }
    const std::size_t equals = line.find('=');
    if (equals == std::string::npos || equals == 0) {
      throw UserError("{}:{}: '{}' is not of the form `option = value`", where, number, line);
    }
    lines.push_back({.section = section,
                     .key = trimmed(line.substr(0, equals)),
                     .value = trimmed(line.substr(equals + 1)),
                     .line = number});
  }
  return lines;
}

std::string help() {
  Options options;
  std::ostringstream out;
  out << "Regroup trains T5 1.1 with grouped-query attention, over MPI ranks.\n\n"
         "  mpirun -n N trainer --MODE [--config FILE]... [--OPTION VALUE]...\n\n"
      << describe_modes(options);
  for (const po::options_description& group : describe_options(options)) out << '\n' << group;
  out << "\nREGROUP_CPU_LEVEL in the environment (portable, avx2, avx512, avx512_bf16) keeps a run from "
         "instructions "
         "above that level.\n"
      << "\nA configuration file has lines `option = value`, comments after '#', and sections [pretrain], "
         "[uptrain], ...\n"
         "whose lines count for that mode only. Where a training mode is given\n"
         "none of --config, --corpus, --model and --init-from, the embedded configs/quickstart.cfg is "
         "used.\n\n"
         "Exit codes: 0 done, 1 a failure of the system or a bug, 2 something to put right in the call or "
         "its files,\n"
         "75 stopped by a signal or the stop file after saving, 76 ended by the watchdog: the same command "
         "resumes;\n77 several starts in a row made no progress.\n";
  return out.str();
}

int threads_of(int requested, int ranks_on_host) {
  if (requested > 0) return requested;
  if (const char* given = std::getenv("OMP_NUM_THREADS")) {
    const int threads = std::atoi(given);
    if (threads > 0) return threads;
  }
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  const int cores = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
  return std::max(1, cores / std::max(1, ranks_on_host));
}

}  // namespace regroup
