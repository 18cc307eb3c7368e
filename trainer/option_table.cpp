#include "trainer/option_table.h"

#include "trainer/model/config.h"

namespace regroup {

namespace po = boost::program_options;

const std::vector<std::pair<std::string, Mode>>& modes() {
  static const std::vector<std::pair<std::string, Mode>> all = {{"help", Mode::kHelp},
                                                                {"version", Mode::kVersion},
                                                                {"train-tokenizer", Mode::kTrainTokenizer},
                                                                {"prepare-data", Mode::kPrepareData},
                                                                {"pretrain", Mode::kPretrain},
                                                                {"uptrain", Mode::kUptrain},
                                                                {"evaluate", Mode::kEvaluate},
                                                                {"convert", Mode::kConvert},
                                                                {"export", Mode::kExport},
                                                                {"report", Mode::kReport},
                                                                {"doctor", Mode::kDoctor}};
  return all;
}

namespace {

// A path as it is compared and shown: without "." parts and a '/' at its end.
std::filesystem::path normal(const std::string& text) {
  const std::filesystem::path path = std::filesystem::path(text).lexically_normal();
  return path.has_filename() || !path.has_parent_path() || path == path.root_path() ? path
                                                                                    : path.parent_path();
}

// A value bound to a member, with its present value as the default that --help shows.
template <class T>
po::typed_value<T>* bound(T& member) {
  return po::value<T>(&member)->default_value(member, fmt::format("{}", member));
}
po::typed_value<std::string>* text(std::string& member) {
  return po::value<std::string>(&member)->default_value(member);
}
po::typed_value<std::string>* path(std::filesystem::path& member, const char* name = "PATH") {
  return po::value<std::string>()->value_name(name)->notifier(
      [&member](const std::string& value) { member = normal(value); });
}
// Read as signed: Boost wraps a negative number into an unsigned one without a word.
po::typed_value<index_t>* seed(std::uint64_t& member) {
  return po::value<index_t>()->default_value(0)->notifier([&member](index_t value) {
    if (value < 0) throw UserError("seed = {}; it must be at least 0", value);
    member = static_cast<std::uint64_t>(value);
  });
}
template <class T>
po::typed_value<T>* optional(std::optional<T>& member) {
  return po::value<T>()->notifier([&member](const T& value) { member = value; });
}
po::typed_value<std::vector<std::string>>* paths(std::vector<std::filesystem::path>& member) {
  return po::value<std::vector<std::string>>()->multitoken()->composing()->value_name("PATH...")->notifier(
      [&member](const std::vector<std::string>& values) {
        member.clear();
        for (const std::string& value : values) member.push_back(normal(value));
      });
}
po::typed_value<bool>* flag(bool& member) {
  return po::value<bool>(&member)
      ->default_value(member, member ? "on" : "off")
      ->implicit_value(true)
      ->value_name("on|off");
}

}  // namespace

po::options_description describe_modes(Options& o) {
  po::options_description group("Modes (one of)");
  group.add_options()("help", "this text")("version", "the version")(
      "train-tokenizer", "text to a SentencePiece vocabulary (--input, --output)")(
      "prepare-data", "text to a token corpus (--input, --tokenizer, --output)")(
      "pretrain", "train a T5 1.1 from scratch")(
      "uptrain", "convert a multi-head checkpoint to grouped queries and train on")(
      "evaluate", "held-out loss of a checkpoint at any layout")(
      "convert", "a checkpoint with fewer key/value groups, and what it loses (--init-from, --output)")(
      "export", po::value<std::string>(&o.export_format)->value_name("FORMAT"),
      "a checkpoint for other programs (--checkpoint, --output): hf, with grouped heads and the code that "
      "runs "
      "them in transformers; t5x, with the optimizer's moments; or either of them -expanded, with heads "
      "repeated, for whatever loads a "
      "stock T5")("report", "compare finished runs (--runs)")(
      "doctor", "look for what would make a run under this launcher slow or fragile");
  return group;
}

std::vector<po::options_description> describe_options(Options& o) {
  std::vector<po::options_description> groups;
  const auto group = [&groups](const char* title) -> po::options_description_easy_init {
    groups.emplace_back(title);
    return groups.back().add_options();
  };
  groups.reserve(16);
  group("Run")("config", po::value<std::vector<std::string>>()->composing()->value_name("FILE"),
               "configuration file; may be repeated, later ones win, the command line wins over all")(
      "run", path(o.run), "directory of the run; the same command again resumes what is there")(
      "seed", seed(o.seed), "of initial weights, sample order, span masks, dropout")(
      "device", text(o.device), "cpu, or cuda: one GPU a rank")(
      "threads", bound(o.threads), "of each rank; 0: OMP_NUM_THREADS, or its share of the host's cores")(
      "collectives", text(o.collectives),
      "how tensors of GPUs travel: auto, nccl, or host (through host memory: also where ranks share a GPU)")(
      "hang-timeout", bound(o.hang_timeout),
      "seconds without progress until a rank counts as hung and the job is ended; 0: never")(
      "restart-budget", bound(o.restart_budget),
      "starts in a row that may come to no new checkpoint; 0: any number")(
      "deterministic", flag(o.deterministic),
      "cuda: fixed algorithms in place of measured ones and no sums in NVLink's switches: a second run from "
      "the start, and a resumed one, have the same bits");
  group("Model")("model", text(o.model), "size: tiny, small, base, large, xl or xxl")(
      "d-model", optional(o.d_model), "instead of the size's")(
      "d-kv", optional(o.d_kv), "instead of the size's")("d-ff", optional(o.d_ff), "instead of the size's")(
      "heads", optional(o.heads), "instead of the size's")("layers", optional(o.layers),
                                                           "encoder layers, instead of the size's")(
      "decoder-layers", optional(o.decoder_layers), "instead of as many as the encoder's")(
      "kv-groups", optional(o.kv_groups),
      "key/value groups G of the decoder's attentions (default: as many as heads)")(
      "encoder-kv-groups", optional(o.encoder_kv_groups),
      "key/value groups of the encoder (default: as many as heads)")(
      "dropout", bound(o.dropout), "rate; T5 pretrains and uptrains with 0, fine-tunes with 0.1");
  group("Layout")("tensor-parallel", bound(o.layout.tensor_parallel),
                  "ranks that share one model: heads, groups, d_ff and vocabulary are split over them")(
      "data-parallel", bound(o.layout.data_parallel), "ranks that share one batch; 0: all others")(
      "precision", text(o.precision),
      "of weights and activations in products: bf16, fp32, or auto: bf16 where every rank's device "
      "multiplies it "
      "in hardware, else fp32 (masters are fp32)")(
      "recompute", flag(o.recompute), "keep only each layer's input for backward: less memory, more time");
  group("Data")("corpus", path(o.corpus), "folder that --prepare-data made")(
      "verify-corpus", flag(o.verify_corpus),
      "compare the corpus with its checksums before training; the ranks share the reading")(
      "inputs-length", bound(o.inputs_length), "encoder tokens of a sample; targets follow (512: 114)")(
      "noise-density", bound(o.noise_density), "share of tokens that is dropped")(
      "mean-span", bound(o.mean_span), "mean length of a dropped span")("workers", bound(o.workers),
                                                                        "threads that make batches ahead");
  group("Training")("steps", bound(o.steps), "optimizer steps of --pretrain")(
      "batch-size", bound(o.batch_size), "sequences of one step, over all ranks")(
      "micro-batch", bound(o.micro_batch),
      "sequences of one forward and backward of a rank; 0: those that make 4096 inputs (cuda: 32768, or as "
      "many as its memory holds)")("optimizer", text(o.optimizer), "adafactor (T5's) or adamw")(
      "schedule", text(o.schedule), "of the learning rate: rsqrt (T5's), constant, linear, cosine")(
      "learning-rate", optional(o.learning_rate),
      "the schedule's base; default 1 for rsqrt, 0.001 for the others")(
      "warmup", bound(o.warmup), "steps; of rsqrt: base / sqrt(max(step, warmup))")(
      "weight-decay", bound(o.weight_decay), "of adamw")(
      "scale-by-rms", flag(o.scale_by_rms),
      "adamw: scale updates by the parameter's root mean square, as adafactor")(
      "max-gradient-norm", bound(o.max_gradient_norm), "clip the gradient to this norm; 0: never")(
      "z-loss", bound(o.z_loss), "coefficient of log(Z)^2")(
      "on-divergence", text(o.on_divergence),
      "a step whose loss or gradient is not finite, or a spike: stop; skip its update; or rollback to the "
      "last "
      "checkpoint and leave out the samples since")(
      "spike-threshold", bound(o.spike_threshold),
      "standard deviations above the recent mean from which a loss or gradient norm is a spike; 0: none is");
  group("Uptraining")("init-from", path(o.init_from),
                      "parent: a run, one of its step directories, or a T5 or mT5 of transformers or T5X")(
      "alpha", bound(o.alpha), "train on for this share of the parent's steps")(
      "parent-steps", bound(o.parent_steps), "steps of a parent that does not say (public T5 1.1: 1000000)")(
      "parent-moments", flag(o.parent_moments),
      "go on with the parent's optimizer state, where it has one, of what conversion leaves as it is")(
      "pooling", text(o.pooling), "of a group's heads: mean, first, random, spectral or calibrated")(
      "grouping", text(o.grouping), "heads of a group: position (neighbours) or similarity")(
      "kv-budget", text(o.kv_budget),
      "even: every decoder attention gets --kv-groups; uneven: so many on average, more where merging loses "
      "more")("calibration-batches", bound(o.calibration_batches),
              "batches of the corpus that show the attentions' inputs to --pooling calibrated")(
      "calibration-memory", bound(o.calibration_memory),
      "MiB of a rank for what they show, in several passes where needed; 0: one pass")(
      "until-recovered", bound(o.until_recovered),
      "end before alpha, at the first evaluation with this share of what the conversion cost won back, such "
      "as 0.99; 0: never");
  group("Checkpoints and evaluation")("save-every", bound(o.save_every), "steps")(
      "background-save", flag(o.background_save), "write checkpoints while training goes on")(
      "save-memory", bound(o.save_memory),
      "MiB of host memory of each rank for a checkpoint being written; 0: its whole share, for the shortest "
      "interruption")("keep-last", bound(o.keep_last), "newest checkpoints to keep")(
      "keep-every", bound(o.keep_every), "keep multiples of this step for good; 0: none")(
      "evaluate-every", bound(o.evaluate_every), "steps; 0: only at the end")(
      "evaluation-samples", bound(o.evaluation_samples), "held-out samples")(
      "progress-every", bound(o.progress_every), "steps between progress lines where output is no terminal")(
      "checkpoint", path(o.checkpoint),
      "--evaluate, --export: a run, a step directory, or a T5 or mT5 of transformers or T5X");
  group("Export")("export-type", text(o.export_type), "of the weights: fp32, bf16 or fp16")(
      "self-check", flag(o.self_check),
      "compare the logits of what was written with the checkpoint's on one batch; it takes both models, one "
      "after the other, in memory");
  group("Text to corpus")("input", paths(o.inputs),
                          "text, JSON lines ({\"text\": ...}), .gz of either, or folders of them")(
      "output", path(o.output),
      "the corpus folder, the vocabulary file, the converted run, or the exported model")(
      "tokenizer", path(o.tokenizer, "FILE"), "SentencePiece model")(
      "vocab-pieces", bound(o.vocab_pieces), "pieces of a new vocabulary (100 sentinels come on top)")(
      "heldout-fraction", bound(o.heldout_fraction), "share of documents kept from training")(
      "vocab-sentences", bound(o.vocab_sentences), "lines of text that a new vocabulary is learnt from")(
      "shard-tokens", bound(o.shard_tokens), "tokens of one file of the corpus")(
      "document", text(o.document), "what a document of a plain text file is: file or line")(
      "max-bad-fraction", bound(o.max_bad_fraction),
      "share of lines that may be malformed (they are reported)")("overwrite", flag(o.overwrite),
                                                                  "replace another corpus");
  group("Report")("runs", paths(o.runs), "run directories");
  return groups;
}

po::options_description all_options(Options& options) {
  po::options_description all;
  all.add(describe_modes(options));
  for (const po::options_description& group : describe_options(options)) all.add(group);
  return all;
}

}  // namespace regroup
