// Corpora for tests: a hand-made one, and several threads that prepare one together as ranks would.
#pragma once

#include <barrier>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>

#include "data/corpus.h"
#include "data/corpus_writer.h"
#include "kernels/base/file.h"
#include "tests/data/fixture.h"

namespace regroup::test {

// Stands in for MPI_Allgatherv between threads.
class Gatherer {
 public:
  explicit Gatherer(int parts) : lists_(static_cast<std::size_t>(parts)), barrier_(parts) {}
  std::vector<std::uint64_t> operator()(int part, std::span<const std::uint64_t> own) {
    lists_[static_cast<std::size_t>(part)].assign(own.begin(), own.end());
    barrier_.arrive_and_wait();
    std::vector<std::uint64_t> all;
    for (const auto& list : lists_) all.insert(all.end(), list.begin(), list.end());
    barrier_.arrive_and_wait();
    return all;
  }

 private:
  std::vector<std::vector<std::uint64_t>> lists_;
  std::barrier<> barrier_;
};

struct SharedOutcome {
  std::vector<CorpusResult> results;
  std::vector<std::string> errors;  // one a part, "" where it did not fail
};

// prepare_corpus() on `parts` threads; `adjust` may change a part's options.
inline SharedOutcome prepare_together(const CorpusOptions& options, int parts,
                                      const std::function<void(int, CorpusOptions&)>& adjust = {}) {
  Gatherer gatherer(parts);
  SharedOutcome outcome;
  outcome.results.resize(static_cast<std::size_t>(parts));
  outcome.errors.resize(static_cast<std::size_t>(parts));
  std::vector<std::jthread> threads;
  for (int part = 0; part < parts; ++part) {
    threads.emplace_back([&, part] {
      CorpusOptions own = options;
      if (adjust) adjust(part, own);
      const auto at = static_cast<std::size_t>(part);
      try {
        outcome.results[at] = prepare_corpus(
            own, {part, parts, [&](std::span<const std::uint64_t> list) { return gatherer(part, list); }});
      } catch (const std::exception& error) {
        outcome.errors[at] = error.what();
      }
    });
  }
  threads.clear();  // joins
  return outcome;
}

// All files of a folder with their bytes.
inline std::map<std::string, std::string> contents(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    files[entry.path().filename().string()] = read_bytes(entry.path());
  }
  return files;
}

// A corpus of one train and one held-out shard a list, with these tokens, under a made-up tokenizer.
inline void write_corpus(const std::filesystem::path& folder,
                         const std::vector<std::vector<std::uint16_t>>& train,
                         const std::vector<std::vector<std::uint16_t>>& heldout,
                         std::uint64_t pieces = 1000) {
  Manifest manifest;
  manifest.pieces = pieces;
  manifest.vocab_size = (pieces + 100 + 127) / 128 * 128;
  manifest.tokenizer_file = "tokenizer.model";
  write_bytes(folder / "tokenizer.model", "stands for a tokenizer");
  manifest.tokenizer_checksum = checksum_file(folder / "tokenizer.model");
  manifest.recipe.document = "file";
  int number = 0;
  const auto add = [&](Split split, const std::vector<std::uint16_t>& tokens) {
    Shard shard{.tokens_file = fmt::format("tokens-{:05}.bin", number),
                .documents_file = fmt::format("documents-{:05}.bin", number),
                .tokens = tokens.size(),
                .documents = 1};
    ++number;
    write_bytes(folder / shard.tokens_file,
                {reinterpret_cast<const char*>(tokens.data()), tokens.size() * 2});
    write_bytes(folder / shard.documents_file, std::string(8, '\0'));
    shard.tokens_checksum = checksum_file(folder / shard.tokens_file);
    shard.documents_checksum = checksum_file(folder / shard.documents_file);
    manifest.splits[static_cast<std::size_t>(split)].push_back(shard);
  };
  for (const auto& tokens : train) add(Split::kTrain, tokens);
  for (const auto& tokens : heldout) add(Split::kHeldout, tokens);
  write_bytes(folder / kManifestFile, to_json(manifest));
}

// `count` pseudo-random pieces in [3, pieces).
inline std::vector<std::uint16_t> random_tokens(std::size_t count, std::uint64_t seed,
                                                std::uint64_t pieces = 1000) {
  const Philox philox(seed, RandomPurpose::kTest);
  std::vector<std::uint16_t> tokens(count);
  for (std::size_t i = 0; i < count; ++i)
    tokens[i] = static_cast<std::uint16_t>(3 + philox.below(pieces - 3, i));
  return tokens;
}

}  // namespace regroup::test
