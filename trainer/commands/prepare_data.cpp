#include "data/corpus_writer.h"
#include "data/tokenizer.h"
#include "trainer/commands/commands.h"
#include "trainer/run/progress.h"

namespace regroup {
namespace {

TextOptions text_options(const Options& options) {
  return {.document = options.document == "line" ? TextDocument::kLine : TextDocument::kFile,
          .max_bad_fraction = options.max_bad_fraction};
}

void report_text(const TextStatistics& statistics, const Log& log) {
  log.info("read {} documents, {:.1f} MB", format_count(static_cast<std::int64_t>(statistics.documents)),
           static_cast<double>(statistics.bytes) * 1e-6);
  if (statistics.bad_lines == 0) return;
  log.info("left out {} malformed lines:", format_count(static_cast<std::int64_t>(statistics.bad_lines)));
  for (const std::string& line : statistics.first_bad) log.info("  {}", line);
}

}  // namespace

int train_tokenizer_command(const Options& options, const ProcessGroup& world, const Log& log) {
  world.run_on(0, [&] {
    const TextStatistics statistics =
        train_tokenizer(options.inputs, options.output,
                        {.vocab_pieces = narrow<std::int32_t>(options.vocab_pieces),
                         .max_sentences = options.vocab_sentences,
                         .seed = options.seed,
                         .text = text_options(options)});
    report_text(statistics, log);
    log.info("wrote {}: {} pieces, an embedding of {} rows", options.output.string(), options.vocab_pieces,
             Tokenizer(options.output).vocab_size());
  });
  return 0;
}

int prepare_data_command(const Options& options, const ProcessGroup& world, const Log& log) {
  const WorkShare share = {
      .part = world.rank(), .parts = world.size(), .gather = [&world](std::span<const std::uint64_t> own) {
        std::vector<std::uint64_t> all;
        for (const auto& part : world.all_gather(std::vector(own.begin(), own.end()))) {
          all.insert(all.end(), part.begin(), part.end());
        }
        return all;
      }};
  CorpusResult result;
  world.run_together([&] {
    result = prepare_corpus({.inputs = options.inputs,
                             .tokenizer = options.tokenizer,
                             .output = options.output,
                             .heldout_fraction = options.heldout_fraction,
                             .shard_tokens = static_cast<std::uint64_t>(options.shard_tokens),
                             .text = text_options(options),
                             .overwrite = options.overwrite},
                            share);
  });
  if (result.was_there) {
    log.info("{} is complete already", options.output.string());
  } else {
    report_text(result.statistics, log);
  }
  const auto count = [&](Split split) {
    return format_count(static_cast<std::int64_t>(result.manifest.tokens(split)));
  };
  log.info("{}: {} training tokens, {} held-out tokens, vocabulary {}", options.output.string(),
           count(Split::kTrain), count(Split::kHeldout), result.manifest.vocab_size);
  return 0;
}

}  // namespace regroup
