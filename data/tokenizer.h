// T5's view of a SentencePiece vocabulary, and the training of new ones.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/text_reader.h"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace regroup {

// A SentencePiece model under T5's conventions: the model's pieces have the ids [0, pieces), the 100
// sentinels <extra_id_99> .. <extra_id_0> the ids [pieces, pieces + 100), and the embedding's rows are padded
// to a multiple of 128 (32,000 pieces -> 32,100 ids -> 32,128 rows). Where the model's last 100 pieces are
// the sentinels already, as mT5's are, they are not counted as pieces (250,000 -> 250,100 -> 250,112).
// Immutable after construction: encode() and decode() may be called by several threads at once.
class Tokenizer {
 public:
  static constexpr std::int32_t kPad = 0;
  static constexpr std::int32_t kEos = 1;
  static constexpr std::int32_t kUnknown = 2;
  static constexpr std::int32_t kSentinels = 100;
  static constexpr std::int32_t kVocabMultiple = 128;

  // Reads a SentencePiece model file. Throws UserError where it is missing, is no such model, or numbers its
  // special pieces otherwise than T5 does (pad 0, eos 1, unk 2).
  explicit Tokenizer(const std::filesystem::path& path);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The ids of `text` (UTF-8), without eos. Never pad, eos or a sentinel, whatever the text holds.
  std::vector<std::int32_t> encode(std::string_view text) const;
  // The text of `ids`: pad and eos are silent, sentinels read <extra_id_7>, padding rows as unknown.
  // Throws UserError for an id outside [0, vocab_size()).
  std::string decode(std::span<const std::int32_t> ids) const;

  std::int32_t piece_count() const;                                          // ids of text
  std::int32_t extended_size() const { return piece_count() + kSentinels; }  // ids with a meaning
  std::int32_t vocab_size() const;                                           // rows of the embedding
  std::int32_t sentinel(std::int32_t i) const;                               // id of <extra_id_i>
  bool holds_sentinels() const { return holds_sentinels_; }                  // as pieces of the model
  std::uint64_t checksum() const { return checksum_; }                       // XXH3 of the model file

 private:
  void encode_chunk(std::string_view text, std::vector<std::int32_t>& ids) const;

  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::uint64_t checksum_ = 0;
  bool holds_sentinels_ = false;
  bool splits_at_spaces_ = false;  // encode("a b") == encode("a") + encode("b")
};

struct TokenizerTraining {
  std::int32_t vocab_pieces = 32000;   // pieces of the model, pad, eos and unk included, sentinels not
  double character_coverage = 0.9995;  // share of the text's characters that get a piece; the rest is unknown
  std::int64_t max_sentences =
      1000000;             // lines trained on, drawn uniformly; bounds memory (each <= 4,192 bytes)
  std::uint64_t seed = 0;  // of that draw
  TextOptions text = {};
};

// Trains a unigram vocabulary on the documents of `inputs` (files or folders, see find_text()) and writes the
// model file `output`. Unigram, NFKC, no byte fallback, pad 0, eos 1, unk 2, no bos, as T5's. The same inputs
// and options give the same file: the lines are drawn by counter-based random numbers and SentencePiece runs
// with a fixed number of threads (its sums are per thread), whatever the machine has. Returns what was read.
// Throws UserError where the inputs cannot be read or do not carry such a vocabulary.
TextStatistics train_tokenizer(const std::vector<std::filesystem::path>& inputs,
                               const std::filesystem::path& output, const TokenizerTraining& options);

}  // namespace regroup
