#include "data/corpus_manifest.h"

#include <algorithm>
#include <charconv>
#include <set>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "regroup-corpus";
constexpr std::uint64_t kVersion = 1;
constexpr std::uint64_t kMaxCount = std::uint64_t{1} << 48;  // tokens, bytes, lines: far above any corpus
constexpr std::uint64_t kMaxVocab = std::uint64_t{1} << 24;
constexpr std::size_t kMaxShards = std::size_t{1} << 20;
constexpr std::size_t kMaxName = 255;

// Tokenizer::vocab_size() for a number of pieces.
std::uint64_t padded_vocab(std::uint64_t pieces) { return (pieces + 100 + 127) / 128 * 128; }

std::string hex(std::uint64_t value) { return fmt::format("{:016x}", value); }

// A JSON object being read, with the place it stands at for messages.
class Entry {
 public:
  Entry(const json& value, std::string where) : value_(value), where_(std::move(where)) {
    if (!value_.is_object()) fail("should be an object");
  }

  const json& at(const char* key) const {
    const auto found = value_.find(key);
    if (found == value_.end()) fail(fmt::format("has no \"{}\"", key));
    return *found;
  }
  Entry object(const char* key) const { return {at(key), fmt::format("{}, \"{}\"", where_, key)}; }
  std::uint64_t count(const char* key, std::uint64_t limit = kMaxCount) const {
    const json& value = at(key);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > limit) {
      fail(fmt::format("\"{}\" should be a whole number in [0, {}]", key, limit));
    }
    return value.get<std::uint64_t>();
  }
  double fraction(const char* key) const {
    const json& value = at(key);
    if (!value.is_number() || !(value.get<double>() >= 0 && value.get<double>() <= 1)) {
      fail(fmt::format("\"{}\" should be a number in [0, 1]", key));
    }
    return value.get<double>();
  }
  std::string text(const char* key) const {
    const json& value = at(key);
    if (!value.is_string()) fail(fmt::format("\"{}\" should be a string", key));
    return value.get<std::string>();
  }
  std::uint64_t checksum(const char* key) const {
    const std::string digits = text(key);
    std::uint64_t result = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), result, 16);
    if (digits.size() != 16 || error != std::errc{} || end != digits.data() + digits.size()) {
      fail(fmt::format("\"{}\" should be a checksum of 16 hexadecimal digits", key));
    }
    return result;
  }
  // The name of a file right inside the corpus folder.
  std::string file(const char* key) const {
    std::string name = text(key);
    const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
             c == '-' || c == '_';
    });
    if (name.empty() || name.size() > kMaxName || name.front() == '.' || !plain) {
      fail(fmt::format("\"{}\" should be a plain file name of letters, digits, '-', '_' and '.'", key));
    }
    return name;
  }
  const std::string& where() const { return where_; }

  [[noreturn]] void fail(const std::string& what) const {
    throw UserError("{}: {}; the corpus is damaged or of another version, prepare it again", where_, what);
  }

 private:
  const json& value_;
  std::string where_;
};

CorpusRecipe parse_recipe(const Entry& entry) {
  CorpusRecipe recipe;
  recipe.heldout_fraction = entry.fraction("heldout_fraction");
  recipe.shard_tokens = entry.count("shard_tokens");
  recipe.unit_bytes = entry.count("unit_bytes");
  recipe.max_line_bytes = entry.count("max_line_bytes");
  recipe.document = entry.text("document");
  if (recipe.document != "file" && recipe.document != "line")
    entry.fail("\"document\" should be \"file\" or \"line\"");
  recipe.input_files = entry.count("input_files");
  recipe.input_checksum = entry.checksum("input_checksum");
  return recipe;
}

CorpusStatistics parse_statistics(const Entry& entry) {
  return {entry.count("bytes"), entry.count("lines"), entry.count("bad_lines"),
          entry.count("empty_documents")};
}

std::vector<Shard> parse_shards(const Entry& splits, Split split, std::set<std::string>& names) {
  const std::string key(name_of(split));
  const json& list = splits.at(key.c_str());
  if (!list.is_array() || list.size() > kMaxShards)
    splits.fail(fmt::format("\"{}\" should be a list of shards", key));
  std::vector<Shard> shards;
  std::uint64_t tokens = 0;
  for (const json& value : list) {
    const Entry entry(value, fmt::format("{}, \"{}\" shard {}", splits.where(), key, shards.size()));
    Shard shard{
        entry.file("tokens_file"), entry.file("documents_file"),      entry.count("tokens"),
        entry.count("documents"),  entry.checksum("tokens_checksum"), entry.checksum("documents_checksum")};
    if (shard.tokens == 0) entry.fail("a shard of 0 tokens");
    if (shard.documents > shard.tokens) entry.fail("more documents than tokens");
    tokens += shard.tokens;  // at most 2^20 times 2^48: cannot wrap before the next line sees it
    if (tokens > kMaxCount) entry.fail(fmt::format("more than {} tokens", kMaxCount));
    for (const auto& name : {shard.tokens_file, shard.documents_file}) {
      if (!names.insert(name).second) entry.fail(fmt::format("the file {} occurs twice", name));
    }
    shards.push_back(std::move(shard));
  }
  return shards;
}

json json_of(const Shard& shard) {
  return {{"tokens_file", shard.tokens_file},
          {"documents_file", shard.documents_file},
          {"tokens", shard.tokens},
          {"documents", shard.documents},
          {"tokens_checksum", hex(shard.tokens_checksum)},
          {"documents_checksum", hex(shard.documents_checksum)}};
}

}  // namespace

std::string_view name_of(Split split) { return split == Split::kTrain ? "train" : "heldout"; }

std::uint64_t Manifest::tokens(Split split) const {
  std::uint64_t sum = 0;
  for (const auto& shard : shards(split)) sum += shard.tokens;
  return sum;
}

std::uint64_t Manifest::documents(Split split) const {
  std::uint64_t sum = 0;
  for (const auto& shard : shards(split)) sum += shard.documents;
  return sum;
}

std::string to_json(const Manifest& manifest) {
  json splits = json::object();
  for (const Split split : kSplits) {
    json& list = splits[std::string(name_of(split))] = json::array();
    for (const auto& shard : manifest.shards(split)) list.push_back(json_of(shard));
  }
  const auto& recipe = manifest.recipe;
  const auto& statistics = manifest.statistics;
  const json result = {{"format", kFormat},
                       {"version", kVersion},
                       {"dtype", manifest.token_bytes == 2 ? "uint16" : "uint32"},
                       {"vocab_size", manifest.vocab_size},
                       {"tokenizer",
                        {{"file", manifest.tokenizer_file},
                         {"pieces", manifest.pieces},
                         {"checksum", hex(manifest.tokenizer_checksum)}}},
                       {"recipe",
                        {{"heldout_fraction", recipe.heldout_fraction},
                         {"shard_tokens", recipe.shard_tokens},
                         {"unit_bytes", recipe.unit_bytes},
                         {"max_line_bytes", recipe.max_line_bytes},
                         {"document", recipe.document},
                         {"input_files", recipe.input_files},
                         {"input_checksum", hex(recipe.input_checksum)}}},
                       {"statistics",
                        {{"bytes", statistics.bytes},
                         {"lines", statistics.lines},
                         {"bad_lines", statistics.bad_lines},
                         {"empty_documents", statistics.empty_documents}}},
                       {"splits", splits}};
  return json_text(result, 2) + "\n";
}

Manifest parse_manifest(std::string_view text, std::string_view where) {
  const json value = parse_json_or_discard(text);
  if (value.is_discarded()) throw UserError("{} is not JSON; the corpus is damaged, prepare it again", where);
  const Entry entry(value, std::string(where));
  if (entry.text("format") != kFormat) entry.fail("is not the manifest of a corpus");
  if (const auto version = entry.count("version"); version != kVersion) {
    entry.fail(fmt::format("has version {}, this program reads version {}", version, kVersion));
  }
  Manifest manifest;
  const std::string dtype = entry.text("dtype");
  if (dtype != "uint16" && dtype != "uint32") entry.fail("\"dtype\" should be \"uint16\" or \"uint32\"");
  manifest.token_bytes = dtype == "uint16" ? 2 : 4;
  manifest.vocab_size = entry.count("vocab_size", kMaxVocab);
  if (manifest.vocab_size == 0 || (manifest.token_bytes == 2) != (manifest.vocab_size <= 65536)) {
    entry.fail(fmt::format("a vocabulary of {} does not go with {}", manifest.vocab_size, dtype));
  }
  const Entry tokenizer = entry.object("tokenizer");
  manifest.tokenizer_file = tokenizer.file("file");
  manifest.tokenizer_checksum = tokenizer.checksum("checksum");
  manifest.pieces = tokenizer.count("pieces", kMaxVocab);
  if (manifest.vocab_size != padded_vocab(manifest.pieces)) {
    tokenizer.fail(
        fmt::format("{} pieces do not make a vocabulary of {}", manifest.pieces, manifest.vocab_size));
  }
  manifest.recipe = parse_recipe(entry.object("recipe"));
  manifest.statistics = parse_statistics(entry.object("statistics"));
  const Entry splits = entry.object("splits");
  std::set<std::string> names = {manifest.tokenizer_file, "manifest.json"};
  for (const Split split : kSplits) {
    manifest.splits[static_cast<std::size_t>(split)] = parse_shards(splits, split, names);
  }
  return manifest;
}

}  // namespace regroup
