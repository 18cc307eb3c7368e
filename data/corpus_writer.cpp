#include "data/corpus_writer.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <string>

#include "data/corpus.h"
#include "data/tokenizer.h"
#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {
namespace {

constexpr std::uint64_t kBlock = std::uint64_t{4} << 20;

std::uint64_t checksum_of(const std::string& text) {
  return checksum(std::as_bytes(std::span(text.data(), text.size())));
}

// The lists of texts of all parts, one after the other.
std::vector<std::string> gather_texts(const WorkShare& share, const std::vector<std::string>& own) {
  std::vector<std::uint64_t> words;
  for (const auto& text : own) {
    words.push_back(text.size());
    const std::size_t at = words.size();
    words.resize(at + (text.size() + 7) / 8);
    if (!text.empty()) std::memcpy(words.data() + at, text.data(), text.size());
  }
  const auto all = share.gather(words);
  std::vector<std::string> texts;
  for (std::size_t at = 0; at < all.size();) {
    const std::size_t size = all[at++];
    check((size + 7) / 8 <= all.size() - at, "the gathered texts are cut off");
    texts.emplace_back(reinterpret_cast<const char*>(all.data() + at), size);
    at += (size + 7) / 8;
  }
  return texts;
}

// Runs one step on every part and waits for all; where any part failed, all throw.
template <class Step>
void agree(const WorkShare& share, Step&& step) {
  std::vector<std::string> failure;
  std::exception_ptr own;
  try {
    step();
  } catch (const std::exception& error) {
    failure.emplace_back(error.what());
    own = std::current_exception();
  }
  const auto failures = gather_texts(share, failure);
  if (own) std::rethrow_exception(own);
  if (!failures.empty()) throw UserError("{}", failures.front());
}

// A file of numbers being written through a buffer.
class NumberFile {
 public:
  explicit NumberFile(const std::filesystem::path& path) : file_(path) { buffer_.reserve(kBlock); }

  template <class T>
  void push(T value) {
    const auto bytes = std::as_bytes(std::span(&value, 1));
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    if (buffer_.size() + sizeof(T) > kBlock) flush();
  }
  void append(std::span<const std::byte> bytes) {
    flush();
    file_.write(bytes);
  }
  void commit() {
    flush();
    file_.commit();
  }

 private:
  void flush() {
    file_.write(std::span<const std::byte>(buffer_));
    buffer_.clear();
  }

  OutputFile file_;
  std::vector<std::byte> buffer_;
};

// What a unit came to, as gathered from the part that read it.
struct UnitCounts {
  std::array<std::uint64_t, 2> tokens{};  // by Split
  std::array<std::uint64_t, 2> documents{};
  std::uint64_t lines = 0;
  std::uint64_t bytes = 0;
  std::uint64_t bad_lines = 0;
  std::uint64_t empty = 0;

  static constexpr std::size_t kWords = 8;
  std::array<std::uint64_t, kWords> words() const {
    return {tokens[0], tokens[1], documents[0], documents[1], lines, bytes, bad_lines, empty};
  }
  static UnitCounts from(std::span<const std::uint64_t, kWords> w) {
    return {{w[0], w[1]}, {w[2], w[3]}, w[4], w[5], w[6], w[7]};
  }
};

class CorpusWriter {
 public:
  CorpusWriter(const CorpusOptions& options, const WorkShare& share)
      : options_(options), share_(share), folder_(partial(options.output)), tokenizer_(options.tokenizer) {}

  CorpusResult run();

 private:
  static std::filesystem::path partial(std::filesystem::path output) {
    output = output / "";  // corpus and corpus/ are the same folder
    output = output.parent_path();
    return output += ".partial";
  }
  std::filesystem::path output() const { return std::filesystem::path(folder_).replace_extension(); }
  std::filesystem::path temporary(int part, Split split, const char* what) const {
    return folder_ / fmt::format("part-{:05}.{}.{}", part, name_of(split), what);
  }

  void find_units();
  std::optional<Manifest> find_existing() const;
  void tokenize();
  template <class T>
  UnitCounts tokenize_unit(const TextUnit& unit, std::array<NumberFile, 2>& tokens,
                           std::array<NumberFile, 2>& documents, TextStatistics& statistics);
  bool held_out(const TextSource& source, const Document& document) const;
  void plan_shards();
  void write_shards();
  void write_shard(Split split, std::uint64_t begin, Shard& shard) const;
  void finish() const;

  const CorpusOptions& options_;
  const WorkShare& share_;
  std::filesystem::path folder_;  // of the work in progress
  Tokenizer tokenizer_;
  std::vector<TextSource> sources_;
  std::vector<TextUnit> units_;
  std::vector<int> owners_;  // of the units
  std::vector<UnitCounts> counts_;
  CorpusResult result_;
};

void CorpusWriter::find_units() {
  sources_ = find_text(options_.inputs);
  units_ = text_units(sources_, options_.text);
  // Each unit goes to the part with the fewest bytes so far.
  std::vector<std::uint64_t> load(static_cast<std::size_t>(share_.parts));
  for (const auto& unit : units_) {
    const auto least = std::min_element(load.begin(), load.end());
    owners_.push_back(static_cast<int>(least - load.begin()));
    *least += unit.bytes + 1;
  }
  std::string inputs;
  for (const auto& source : sources_) inputs += fmt::format("{}\n{}\n", source.name, source.size);
  Manifest& manifest = result_.manifest;
  manifest.vocab_size = static_cast<std::uint64_t>(tokenizer_.vocab_size());
  manifest.pieces = static_cast<std::uint64_t>(tokenizer_.piece_count());
  manifest.token_bytes = manifest.vocab_size <= 65536 ? 2 : 4;
  manifest.tokenizer_file = "tokenizer.model";
  manifest.tokenizer_checksum = tokenizer_.checksum();
  manifest.recipe = {.heldout_fraction = options_.heldout_fraction,
                     .shard_tokens = options_.shard_tokens,
                     .unit_bytes = options_.text.unit_bytes,
                     .max_line_bytes = options_.text.max_line_bytes,
                     .document = options_.text.document == TextDocument::kFile ? "file" : "line",
                     .input_files = sources_.size(),
                     .input_checksum = checksum_of(inputs)};
}

// The manifest of a corpus of this recipe that is already there. UserError where something else is in the
// way.
std::optional<Manifest> CorpusWriter::find_existing() const {
  if (!std::filesystem::exists(output())) return std::nullopt;
  if (!std::filesystem::is_directory(output())) {
    throw UserError("cannot write a corpus to {}: a file of that name is in the way", output().string());
  }
  if (std::filesystem::is_empty(output())) return std::nullopt;
  if (!std::filesystem::exists(output() / kManifestFile)) {
    throw UserError("{} is not empty and holds no corpus; name another output folder", output().string());
  }
  std::string found;
  try {
    const Corpus corpus(output());
    if (corpus.manifest().recipe == result_.manifest.recipe &&
        corpus.manifest().tokenizer_checksum == result_.manifest.tokenizer_checksum) {
      return corpus.manifest();
    }
    found = fmt::format("{} holds a corpus of other text, vocabulary or options", output().string());
  } catch (const UserError& error) {
    found = error.what();
  }
  if (!options_.overwrite) throw UserError("{}; add --overwrite to replace it or name another folder", found);
  return std::nullopt;
}

bool CorpusWriter::held_out(const TextSource& source, const Document& document) const {
  const std::uint64_t hash = checksum_of(fmt::format("{}:{}", source.name, document.offset));
  return static_cast<double>(hash >> 11) * 0x1.0p-53 < options_.heldout_fraction;
}

template <class T>
UnitCounts CorpusWriter::tokenize_unit(const TextUnit& unit, std::array<NumberFile, 2>& tokens,
                                       std::array<NumberFile, 2>& documents, TextStatistics& statistics) {
  const TextSource& source = sources_[unit.source];
  UnitCounts counts;
  TextReader reader(source, unit, options_.text);
  while (const auto document = reader.next()) {
    const auto ids = tokenizer_.encode(document->text);
    if (ids.empty()) {
      ++counts.empty;
      continue;
    }
    const auto split =
        static_cast<std::size_t>(held_out(source, *document) ? Split::kHeldout : Split::kTrain);
    for (const auto id : ids) tokens[split].push(static_cast<T>(id));
    documents[split].push(static_cast<std::uint64_t>(ids.size()));
    counts.tokens[split] += ids.size();
    ++counts.documents[split];
  }
  counts.lines = reader.statistics().lines;
  counts.bytes = reader.statistics().bytes;
  counts.bad_lines = reader.statistics().bad_lines;
  statistics.add(reader.statistics());
  return counts;
}

// Tokenizes this part's units into its temporary files, and learns what all units came to.
void CorpusWriter::tokenize() {
  TextStatistics statistics;
  std::vector<std::uint64_t> own;
  agree(share_, [&] {
    const auto files = [&](const char* what) {
      return std::array{NumberFile(temporary(share_.part, Split::kTrain, what)),
                        NumberFile(temporary(share_.part, Split::kHeldout, what))};
    };
    auto tokens = files("tokens");
    auto documents = files("documents");
    for (std::size_t u = 0; u < units_.size(); ++u) {
      if (owners_[u] != share_.part) continue;
      const auto counts = result_.manifest.token_bytes == 2
                              ? tokenize_unit<std::uint16_t>(units_[u], tokens, documents, statistics)
                              : tokenize_unit<std::uint32_t>(units_[u], tokens, documents, statistics);
      const auto words = counts.words();
      own.insert(own.end(), words.begin(), words.end());
    }
    for (auto& file : tokens) file.commit();
    for (auto& file : documents) file.commit();
  });
  const auto all = share_.gather(own);
  check(all.size() == units_.size() * UnitCounts::kWords, "the gathered counts are not those of the units");
  // They come ordered by part, then unit.
  counts_.resize(units_.size());
  std::size_t at = 0;
  for (int part = 0; part < share_.parts; ++part) {
    for (std::size_t u = 0; u < units_.size(); ++u) {
      if (owners_[u] != part) continue;
      counts_[u] = UnitCounts::from(std::span(all).subspan(at).first<UnitCounts::kWords>());
      at += UnitCounts::kWords;
    }
  }
  auto& total = result_.statistics;
  for (const auto& counts : counts_) {
    total.documents += counts.documents[0] + counts.documents[1] + counts.empty;
    total.lines += counts.lines;
    total.bytes += counts.bytes;
    total.bad_lines += counts.bad_lines;
    result_.manifest.statistics.empty_documents += counts.empty;
  }
  result_.manifest.statistics.bytes = total.bytes;
  result_.manifest.statistics.lines = total.lines;
  result_.manifest.statistics.bad_lines = total.bad_lines;
  total.first_bad = gather_texts(share_, statistics.first_bad);
  if (total.first_bad.size() > TextStatistics::kMaxMessages)
    total.first_bad.resize(TextStatistics::kMaxMessages);
  require_few_bad_lines(total, options_.text);
}

// Decides which tokens lie in which shard.
void CorpusWriter::plan_shards() {
  int number = 0;
  for (const Split split : kSplits) {
    const auto s = static_cast<std::size_t>(split);
    std::uint64_t left = 0;
    for (const auto& counts : counts_) left += counts.tokens[s];
    if (split == Split::kTrain && left == 0) {
      throw UserError("the {} input files give no token to train on", sources_.size());
    }
    for (; left > 0; ++number) {
      const std::uint64_t tokens = std::min(left, options_.shard_tokens);
      left -= tokens;
      result_.manifest.splits[s].push_back({.tokens_file = fmt::format("tokens-{:05}.bin", number),
                                            .documents_file = fmt::format("documents-{:05}.bin", number),
                                            .tokens = tokens});
    }
  }
}

// Writes one shard: the tokens [begin, begin + shard.tokens) of the split, out of the parts' temporary files.
void CorpusWriter::write_shard(Split split, std::uint64_t begin, Shard& shard) const {
  const auto s = static_cast<std::size_t>(split);
  const std::uint64_t end = begin + shard.tokens;
  const std::uint64_t width = result_.manifest.token_bytes;
  NumberFile tokens_file(folder_ / shard.tokens_file);
  NumberFile documents_file(folder_ / shard.documents_file);
  // Where each part's files stand at the unit under way.
  std::vector<std::uint64_t> tokens_at(static_cast<std::size_t>(share_.parts));
  std::vector<std::uint64_t> documents_at(static_cast<std::size_t>(share_.parts));
  std::vector<std::byte> block;
  std::vector<std::uint64_t> lengths;
  std::uint64_t position = 0;  // of the unit in the split
  for (std::size_t u = 0; u < units_.size() && position < end; ++u) {
    const auto part = static_cast<std::size_t>(owners_[u]);
    const std::uint64_t tokens = counts_[u].tokens[s];
    if (tokens > 0 && position + tokens > begin) {
      const std::uint64_t first = std::max(position, begin) - position;
      const std::uint64_t last = std::min(position + tokens, end) - position;
      const InputFile from(temporary(owners_[u], split, "tokens"));
      for (std::uint64_t at = first * width; at < last * width; at += block.size()) {
        block.resize(std::min(kBlock, last * width - at));
        from.read(tokens_at[part] * width + at, block);
        tokens_file.append(block);
      }
      lengths.resize(counts_[u].documents[s]);
      const InputFile starts(temporary(owners_[u], split, "documents"));
      starts.read(documents_at[part] * sizeof(std::uint64_t), std::as_writable_bytes(std::span(lengths)));
      std::uint64_t start = position;
      for (const auto length : lengths) {
        if (start >= begin && start < end) {
          documents_file.push(start - begin);
          ++shard.documents;
        }
        start += length;
      }
    }
    tokens_at[part] += tokens;
    documents_at[part] += counts_[u].documents[s];
    position += tokens;
  }
  tokens_file.commit();
  documents_file.commit();
  shard.tokens_checksum = checksum_file(folder_ / shard.tokens_file);
  shard.documents_checksum = checksum_file(folder_ / shard.documents_file);
}

// Writes this part's shards (every parts-th over both splits) and learns the checksums of all.
void CorpusWriter::write_shards() {
  constexpr std::size_t kWords = 3;
  std::vector<Shard*> shards;
  for (auto& split : result_.manifest.splits) {
    for (auto& shard : split) shards.push_back(&shard);
  }
  const std::size_t train = result_.manifest.shards(Split::kTrain).size();
  const auto parts = static_cast<std::size_t>(share_.parts);
  const auto part = static_cast<std::size_t>(share_.part);
  std::vector<std::uint64_t> own;
  agree(share_, [&] {
    for (std::size_t i = part; i < shards.size(); i += parts) {
      const bool is_train = i < train;
      write_shard(is_train ? Split::kTrain : Split::kHeldout,
                  (is_train ? i : i - train) * options_.shard_tokens, *shards[i]);
      own.insert(own.end(),
                 {shards[i]->documents, shards[i]->tokens_checksum, shards[i]->documents_checksum});
    }
  });
  const auto all = share_.gather(own);
  check(all.size() == shards.size() * kWords, "the gathered checksums are not those of the shards");
  std::size_t at = 0;
  for (std::size_t p = 0; p < parts; ++p) {
    for (std::size_t i = p; i < shards.size(); i += parts, at += kWords) {
      shards[i]->documents = all[at];
      shards[i]->tokens_checksum = all[at + 1];
      shards[i]->documents_checksum = all[at + 2];
    }
  }
}

// Makes the folder complete and puts it in its place; one part does.
void CorpusWriter::finish() const {
  for (int part = 0; part < share_.parts; ++part) {
    for (const Split split : kSplits) {
      std::filesystem::remove(temporary(part, split, "tokens"));
      std::filesystem::remove(temporary(part, split, "documents"));
    }
  }
  write_text(folder_ / result_.manifest.tokenizer_file, read_text(options_.tokenizer));
  write_text(folder_ / kManifestFile, to_json(result_.manifest));
  sync_to_disk(folder_);
  if (!std::filesystem::exists(output())) return rename_durably(folder_, output());
  // A folder cannot be renamed over a full one, so that the old corpus steps aside first.
  const auto old = std::filesystem::path(folder_).replace_extension(".old");
  std::filesystem::remove_all(old);
  rename_durably(output(), old);
  rename_durably(folder_, output());
  std::filesystem::remove_all(old);
}

// Removes a folder at the end of a scope.
class Removal {
 public:
  explicit Removal(std::filesystem::path folder) : folder_(std::move(folder)) {}
  ~Removal() {
    std::error_code ignored;
    if (!folder_.empty()) std::filesystem::remove_all(folder_, ignored);
  }
  Removal(const Removal&) = delete;
  Removal& operator=(const Removal&) = delete;

 private:
  std::filesystem::path folder_;
};

CorpusResult CorpusWriter::run() {
  std::optional<Manifest> existing;
  agree(share_, [&] {
    find_units();
    existing = find_existing();
  });
  const auto& recipe = result_.manifest.recipe;
  const auto views = share_.gather(std::array{recipe.input_checksum, result_.manifest.tokenizer_checksum,
                                              std::uint64_t{existing.has_value()}});
  for (std::size_t i = 3; i < views.size(); ++i) {
    if (views[i] != views[i % 3])
      throw UserError(
          "the processes see different input files, vocabularies or outputs; put them on shared storage");
  }
  if (existing) {
    result_.manifest = *existing;
    result_.was_there = true;
    return result_;
  }
  const Removal removal(share_.part == 0 ? folder_ : std::filesystem::path{});
  agree(share_, [&] {
    if (share_.part != 0) return;
    std::error_code error;
    std::filesystem::remove_all(folder_, error);  // of a run that was killed
    if (error) throw UserError("cannot write {}: {}", folder_.string(), error.message());
    regroup::create_directories(folder_);
  });
  tokenize();
  plan_shards();
  write_shards();
  agree(share_, [&] {
    if (share_.part == 0) finish();
  });
  return result_;
}

void require_sensible(const CorpusOptions& options) {
  if (!(options.heldout_fraction >= 0 && options.heldout_fraction < 1)) {
    throw UserError("a held-out fraction of {} is not in [0, 1)", options.heldout_fraction);
  }
  if (options.shard_tokens == 0) throw UserError("shards of 0 tokens were asked for");
  if (options.text.unit_bytes == 0) throw UserError("units of 0 bytes were asked for");
  if (options.output.empty()) throw UserError("no output folder was named for the corpus");
}

}  // namespace

CorpusResult prepare_corpus(const CorpusOptions& options, const WorkShare& share) {
  check(share.part >= 0 && share.part < share.parts, "there is no part {} of {}", share.part, share.parts);
  require_sensible(options);
  std::optional<CorpusWriter> writer;
  agree(share, [&] { writer.emplace(options, share); });
  return writer->run();
}

}  // namespace regroup
