#include "data/tokenizer.h"

#include <algorithm>
#include <unordered_map>

#include <fmt/format.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/random.h"

namespace regroup {
namespace {

// SentencePiece scores a text with one float32 sum, which loses the pieces' differences over a long document,
// so that long texts are encoded in chunks of about this many bytes.
constexpr std::size_t kChunk = 4096;
constexpr std::size_t kMaxSentence = 4192;  // SentencePiece's own limit for a training sentence, in bytes

bool is_word(char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }

// Where to end a chunk of `text`: at a single space between plain letters, which no normalisation rule
// touches.
std::size_t chunk_end(std::string_view text) {
  for (std::size_t i = kChunk; i + 1 < text.size(); ++i) {
    if (text[i] == ' ' && is_word(text[i - 1]) && is_word(text[i + 1])) return i;
  }
  return text.size();
}

// Whether the model's last pieces are <extra_id_99> .. <extra_id_0>, with or without a space in front.
bool are_sentinels(const sentencepiece::SentencePieceProcessor& processor) {
  const int last = processor.GetPieceSize() - 1;
  if (last < Tokenizer::kSentinels) return false;
  for (int i = 0; i < Tokenizer::kSentinels; ++i) {
    const std::string sentinel = fmt::format("<extra_id_{}>", i);
    const std::string& piece = processor.IdToPiece(last - i);
    if (piece != sentinel && piece != "\xE2\x96\x81" + sentinel) return false;
  }
  return true;
}

}  // namespace

Tokenizer::Tokenizer(const std::filesystem::path& path)
    : processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {
  const std::string model = read_text(path);
  checksum_ = regroup::checksum(std::as_bytes(std::span(model.data(), model.size())));
  if (model.empty() || !processor_->LoadFromSerializedProto(model).ok()) {
    throw UserError("{} is not a SentencePiece model", path.string());
  }
  if (processor_->pad_id() != kPad || processor_->eos_id() != kEos || processor_->unk_id() != kUnknown) {
    throw UserError(
        "the vocabulary {} has pad {}, eos {}, unk {}; T5's 0, 1, 2 are needed (see --train-tokenizer)",
        path.string(), processor_->pad_id(), processor_->eos_id(), processor_->unk_id());
  }
  holds_sentinels_ = are_sentinels(*processor_);
  std::vector<std::int32_t> apart;
  std::vector<std::int32_t> joint;
  encode_chunk("of", apart);
  encode_chunk("the", apart);
  encode_chunk("of the", joint);
  splits_at_spaces_ = apart == joint;
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::int32_t Tokenizer::piece_count() const {
  return processor_->GetPieceSize() - (holds_sentinels_ ? kSentinels : 0);
}

std::int32_t Tokenizer::vocab_size() const {
  return (extended_size() + kVocabMultiple - 1) / kVocabMultiple * kVocabMultiple;
}

std::int32_t Tokenizer::sentinel(std::int32_t i) const {
  check(i >= 0 && i < kSentinels, "there is no sentinel {}", i);
  return extended_size() - 1 - i;
}

void Tokenizer::encode_chunk(std::string_view text, std::vector<std::int32_t>& ids) const {
  std::vector<int> chunk;
  const auto status = processor_->Encode({text.data(), text.size()}, &chunk);
  if (!status.ok()) throw SystemError("SentencePiece could not encode a text: {}", status.message());
  // A text that spells a sentinel holds none.
  for (const int id : chunk) ids.push_back(id < piece_count() ? id : kUnknown);
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> ids;
  ids.reserve(text.size() / 4);
  while (splits_at_spaces_ && text.size() > kChunk) {
    const std::size_t end = chunk_end(text);
    if (end == text.size()) break;
    encode_chunk(text.substr(0, end), ids);
    text.remove_prefix(end + 1);
  }
  encode_chunk(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const {
  std::vector<std::string> pieces;
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab_size())
      throw UserError("the id {} is outside the vocabulary of {}", id, vocab_size());
    if (id < piece_count()) {
      pieces.push_back(processor_->IdToPiece(id));
    } else if (id < extended_size()) {
      pieces.push_back(fmt::format(" <extra_id_{}>", extended_size() - 1 - id));
    } else {
      pieces.push_back(processor_->IdToPiece(kUnknown));
    }
  }
  std::string text;
  const auto status = processor_->Decode(pieces, &text);
  if (!status.ok()) throw SystemError("SentencePiece could not decode: {}", status.message());
  if (text.starts_with(" <extra_id_")) text.erase(0, 1);
  return text;
}

namespace {

// The lines to train on: a uniform sample without replacement of `limit` lines of everything read (Vitter's
// algorithm R), drawn by counter-based random numbers.
class SentenceSample {
 public:
  SentenceSample(std::int64_t limit, std::uint64_t seed)
      : limit_(static_cast<std::uint64_t>(limit)),
        philox_(seed, RandomPurpose::kInitialise, key_of("sentences")) {}

  // Adds the lines of a document, cut at spaces where they are longer than SentencePiece takes.
  void add(std::string_view text) {
    while (!text.empty()) {
      std::size_t end = std::min(text.find('\n'), text.size());
      if (end > kMaxSentence) {
        const std::size_t space = text.rfind(' ', kMaxSentence);
        end = space != std::string_view::npos && space > 0 ? space : character_start(text, kMaxSentence);
      }
      const auto line = text.substr(0, end);
      if (line.find_first_not_of(" \t\r") != std::string_view::npos) keep(line);
      text.remove_prefix(end);
      if (!text.empty() && (text.front() == '\n' || text.front() == ' ')) text.remove_prefix(1);
    }
  }
  const std::vector<std::string>& lines() const { return lines_; }

 private:
  // The last position up to `end` at which a UTF-8 character starts.
  static std::size_t character_start(std::string_view text, std::size_t end) {
    while (end > 1 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
    return end;
  }
  void keep(std::string_view line) {
    const std::uint64_t number = seen_++;
    if (number < limit_) {
      lines_.emplace_back(line);
    } else if (const std::uint64_t slot = philox_.below(number + 1, number); slot < limit_) {
      lines_[slot] = line;
    }
  }

  std::uint64_t limit_;
  Philox philox_;
  std::uint64_t seen_ = 0;
  std::vector<std::string> lines_;
};

class SentenceIterator final : public sentencepiece::SentenceIterator {
 public:
  explicit SentenceIterator(const std::vector<std::string>& lines) : lines_(lines) {}
  bool done() const override { return next_ >= lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::vector<std::string>& lines_;
  std::size_t next_ = 0;
};

// SentencePiece's own sentence, where it says something a user can act on, made into ours.
std::string explanation(const std::string& message, const TokenizerTraining& options) {
  // "... Vocabulary size too high (8000). Please set it to a value <= 1234."
  if (const auto bound = message.find("<= "); message.find("too high") != std::string::npos) {
    return fmt::format("the text is too small for {} pieces; ask for at most {}", options.vocab_pieces,
                       bound == std::string::npos
                           ? "fewer"
                           : message.substr(bound + 3, message.find('.', bound) - bound - 3));
  }
  if (message.find("required_chars") != std::string::npos) {
    return fmt::format(
        "{} pieces are fewer than the characters of the text; ask for more pieces or a lower "
        "character coverage than {} ({})",
        options.vocab_pieces, options.character_coverage, message);
  }
  return message;
}

}  // namespace

TextStatistics train_tokenizer(const std::vector<std::filesystem::path>& inputs,
                               const std::filesystem::path& output, const TokenizerTraining& options) {
  if (options.vocab_pieces < 16)
    throw UserError("a vocabulary of {} pieces is too small to train", options.vocab_pieces);
  if (!(options.character_coverage > 0.9 && options.character_coverage <= 1)) {
    throw UserError("a character coverage of {} is not in (0.9, 1]", options.character_coverage);
  }
  check(options.max_sentences > 0, "a vocabulary of no sentences was asked for");
  const auto sources = find_text(inputs);
  TextStatistics statistics;
  SentenceSample sample(options.max_sentences, options.seed);
  for (const auto& unit : text_units(sources, options.text)) {
    TextReader reader(sources[unit.source], unit, options.text);
    while (const auto document = reader.next()) sample.add(document->text);
    statistics.add(reader.statistics());
  }
  require_few_bad_lines(statistics, options.text);
  if (sample.lines().empty())
    throw UserError("the {} input files hold no text to train a vocabulary on", sources.size());

  const std::unordered_map<std::string, std::string> arguments = {
      {"model_type", "unigram"},
      {"vocab_size", fmt::format("{}", options.vocab_pieces)},
      {"character_coverage", fmt::format("{}", options.character_coverage)},
      {"pad_id", "0"},
      {"eos_id", "1"},
      {"unk_id", "2"},
      {"bos_id", "-1"},
      {"byte_fallback", "false"},
      {"normalization_rule_name", "nmt_nfkc"},
      {"max_sentence_length", fmt::format("{}", kMaxSentence)},
      {"shuffle_input_sentence", "false"},
      {"num_threads", "16"},  // part of the result: its sums are taken per thread
      {"minloglevel", "2"},
  };
  SentenceIterator iterator(sample.lines());
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(arguments, &iterator, &model);
  if (!status.ok())
    throw UserError("no vocabulary could be trained: {}", explanation(status.message(), options));
  write_text(output, model);
  return statistics;
}

}  // namespace regroup
