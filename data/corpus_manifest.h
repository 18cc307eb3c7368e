// What a token corpus says about itself: manifest.json, read strictly.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace regroup {

enum class Split { kTrain, kHeldout };
inline constexpr std::array<Split, 2> kSplits = {Split::kTrain, Split::kHeldout};
// "train" or "heldout".
std::string_view name_of(Split split);

// Two files: the tokens, little-endian, and for each document that starts among them the index of its first
// token in the shard, uint64, little-endian, ascending.
struct Shard {
  std::string tokens_file;
  std::string documents_file;
  std::uint64_t tokens = 0;
  std::uint64_t documents = 0;
  std::uint64_t tokens_checksum = 0;  // XXH3, 64 bits
  std::uint64_t documents_checksum = 0;
};

// What a corpus was made of; two corpora with equal recipes and tokenizers hold the same bytes.
struct CorpusRecipe {
  double heldout_fraction = 0;
  std::uint64_t shard_tokens = 0;
  std::uint64_t unit_bytes = 0;
  std::uint64_t max_line_bytes = 0;
  std::string document;  // "file" or "line"
  std::uint64_t input_files = 0;
  std::uint64_t input_checksum = 0;  // of the inputs' names and sizes, in order
  bool operator==(const CorpusRecipe&) const = default;
};

struct CorpusStatistics {
  std::uint64_t bytes = 0;
  std::uint64_t lines = 0;
  std::uint64_t bad_lines = 0;        // left out
  std::uint64_t empty_documents = 0;  // left out: no token
};

struct Manifest {
  std::uint64_t token_bytes = 2;  // of one token: 2 (uint16) or 4 (uint32)
  std::uint64_t vocab_size = 0;  // rows of the embedding: pieces + 100 sentinels, padded to a multiple of 128
  std::uint64_t pieces = 0;      // of the tokenizer; every token of the corpus is below it
  std::string tokenizer_file;
  std::uint64_t tokenizer_checksum = 0;
  CorpusRecipe recipe;
  CorpusStatistics statistics;
  std::array<std::vector<Shard>, 2> splits;  // by Split

  const std::vector<Shard>& shards(Split split) const { return splits[static_cast<std::size_t>(split)]; }
  std::int32_t first_sentinel() const {
    return static_cast<std::int32_t>(pieces) + 99;
  }  // id of <extra_id_0>
  std::uint64_t tokens(Split split) const;
  std::uint64_t documents(Split split) const;
};

// The manifest as JSON, the same text for equal manifests.
std::string to_json(const Manifest& manifest);

// Reads what to_json() wrote. Nothing in `text` is trusted: missing or mistyped entries, unknown versions,
// counts beyond any memory, file names that leave the folder or occur twice throw UserError, whose one line
// starts with `where` (the file's path). A pure function.
Manifest parse_manifest(std::string_view text, std::string_view where);

}  // namespace regroup
