// Text in, token corpus out: the same bytes however many parts share the work.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <vector>

#include "data/corpus_manifest.h"
#include "data/text_reader.h"

namespace regroup {

struct CorpusOptions {
  std::vector<std::filesystem::path> inputs;  // files and folders, see find_text()
  std::filesystem::path tokenizer;            // a SentencePiece model; copied into the corpus
  std::filesystem::path output;               // the corpus folder
  double heldout_fraction = 0.005;            // share of the documents that is kept from training
  std::uint64_t shard_tokens = std::uint64_t{64} << 20;
  TextOptions text = {};
  bool overwrite = false;  // replace a corpus of another recipe
};

// One of several processes that do the same work together, each of which sees the same files.
struct WorkShare {
  int part = 0;
  int parts = 1;
  // Hands in one list and returns the lists of all parts one after the other, in the order of the parts.
  // Every part calls it equally often; it returns when all have called. (MPI_Allgatherv; for one part, the
  // identity.)
  std::function<std::vector<std::uint64_t>(std::span<const std::uint64_t>)> gather =
      [](std::span<const std::uint64_t> own) { return std::vector(own.begin(), own.end()); };
};

struct CorpusResult {
  Manifest manifest;
  TextStatistics statistics;  // with the first bad lines; empty where the corpus was there already
  bool was_there = false;
};

// Tokenizes every document of the inputs and writes the corpus folder `output`. A function of the files,
// their names and the options, not of the number of parts:
// - the text is cut into units (text_reader.h), which are dealt out to the parts by size and tokenized;
// - the order of the corpus is that of the units; each split's shards hold shard_tokens tokens (the last
// fewer)
//   and are dealt out to the parts, which put them together from the tokenized units;
// - a document is held out where a hash of its place (file name and offset) is below heldout_fraction.
// The folder is written aside as `output`.partial, synced and renamed when it is complete. A complete corpus
// of the same recipe is left alone; another one is replaced only with `overwrite`; a folder that is no corpus
// never. Errors are agreed on: where one part fails, every part throws (its own error, or the first failing
// part's as a UserError), and nothing is left behind. UserError for unreadable or mostly bad text, no text at
// all, an unwritable output, parts that see different files.
CorpusResult prepare_corpus(const CorpusOptions& options, const WorkShare& share = {});

}  // namespace regroup
