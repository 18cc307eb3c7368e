#include "data/text_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include <fmt/ranges.h>
#include <zlib.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

constexpr std::size_t kBlock = std::size_t{1} << 18;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

// Bytes in sequence.
class ByteStream {
 public:
  virtual ~ByteStream() = default;
  // Fills the front of `block`; returns how much, 0 at the end.
  virtual std::size_t read(std::span<char> block) = 0;
};

class PlainStream final : public ByteStream {
 public:
  PlainStream(const std::filesystem::path& path, std::uint64_t begin) : file_(path), position_(begin) {}
  std::size_t read(std::span<char> block) override {
    if (position_ >= file_.size()) return 0;
    const auto part = block.first(std::min<std::uint64_t>(block.size(), file_.size() - position_));
    file_.read(position_, std::as_writable_bytes(part));
    position_ += part.size();
    return part.size();
  }

 private:
  InputFile file_;
  std::uint64_t position_;
};

class GzipStream final : public ByteStream {
 public:
  explicit GzipStream(const std::filesystem::path& path)
      : path_(path), file_(gzopen(path.c_str(), "rb"), gzclose_r) {
    if (!file_) throw UserError("cannot read {}: {}", path.string(), std::strerror(errno));
    gzbuffer(file_.get(), kBlock);
  }
  std::size_t read(std::span<char> block) override {
    const int got = gzread(file_.get(), block.data(), narrow<unsigned>(block.size()));
    if (got < 0) fail();
    if (got > 0 && gzdirect(file_.get()))
      throw UserError("{} is not a gzip file, despite its name", path_.string());
    // At the end zlib tells a complete stream from one cut short only by this code.
    if (static_cast<std::size_t>(got) < block.size()) {
      int code = Z_OK;
      gzerror(file_.get(), &code);
      if (code != Z_OK && code != Z_STREAM_END) fail();
    }
    return static_cast<std::size_t>(got);
  }

 private:
  [[noreturn]] void fail() const {
    int code = Z_OK;
    const std::string reason = gzerror(file_.get(), &code);
    if (code == Z_BUF_ERROR) throw UserError("{} is truncated: its gzip stream ends early", path_.string());
    throw UserError("{} is damaged: {}", path_.string(), code == Z_ERRNO ? std::strerror(errno) : reason);
  }

  std::filesystem::path path_;
  std::unique_ptr<gzFile_s, int (*)(gzFile)> file_;
};

std::uint64_t count_newlines(const std::filesystem::path& path, std::uint64_t end) {
  PlainStream stream(path, 0);
  std::vector<char> block(kBlock);
  std::uint64_t count = 0;
  while (end > 0) {
    const std::size_t got = stream.read(std::span(block).first(std::min<std::uint64_t>(kBlock, end)));
    if (got == 0) break;
    count += static_cast<std::uint64_t>(
        std::count(block.begin(), block.begin() + static_cast<std::ptrdiff_t>(got), '\n'));
    end -= got;
  }
  return count;
}

struct Kind {
  bool json_lines;
  bool gzipped;
};

// What the name of a file says it is; nothing for names that say nothing.
std::optional<Kind> kind_of(const std::filesystem::path& path) {
  std::string extension = path.extension().string();
  const bool gzipped = extension == ".gz";
  if (gzipped) extension = path.stem().extension().string();
  if (extension == ".jsonl" || extension == ".json") return Kind{true, gzipped};
  if (extension == ".txt" || extension == ".rst" || extension == ".md") return Kind{false, gzipped};
  return std::nullopt;
}

void add_folder(const std::filesystem::path& folder, std::vector<TextSource>& sources) {
  // "docs" for docs, docs/ and /some/where/docs; a folder named by dots lends no name.
  const auto normal = std::filesystem::absolute(folder / "").lexically_normal().parent_path();
  std::vector<TextSource> found;
  std::error_code error;
  std::filesystem::recursive_directory_iterator entry(folder, error);
  for (; !error && entry != std::filesystem::recursive_directory_iterator(); entry.increment(error)) {
    const auto kind = kind_of(entry->path());
    std::error_code ignored;  // of links that lead nowhere
    if (!kind || !entry->is_regular_file(ignored)) continue;
    const auto name = normal.filename() / entry->path().lexically_relative(folder);
    found.push_back(
        {entry->path(), name.generic_string(), entry->file_size(), kind->json_lines, kind->gzipped});
  }
  if (error) throw UserError("cannot read the directory {}: {}", folder.string(), error.message());
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  sources.insert(sources.end(), std::make_move_iterator(found.begin()), std::make_move_iterator(found.end()));
}

}  // namespace

void TextStatistics::add(const TextStatistics& later) {
  documents += later.documents;
  lines += later.lines;
  bytes += later.bytes;
  bad_lines += later.bad_lines;
  for (const auto& message : later.first_bad) {
    if (first_bad.size() < kMaxMessages) first_bad.push_back(message);
  }
}

std::vector<TextSource> find_text(const std::vector<std::filesystem::path>& inputs) {
  std::vector<TextSource> sources;
  for (const auto& input : inputs) {
    std::error_code error;
    const auto status = std::filesystem::status(input, error);
    if (!std::filesystem::exists(status))
      throw UserError("there is no text at {}: no such file", input.string());
    if (std::filesystem::is_directory(status)) {
      add_folder(input, sources);
      continue;
    }
    const auto kind = kind_of(input);
    if (!kind) {
      throw UserError(
          "cannot tell what {} is: text files end in .txt, .rst, .md, .jsonl or .json, optionally .gz",
          input.string());
    }
    const InputFile file(input);
    sources.push_back({input, input.filename().string(), file.size(), kind->json_lines, kind->gzipped});
  }
  if (sources.empty()) {
    std::vector<std::string> names;
    names.reserve(inputs.size());
    for (const auto& input : inputs) names.push_back(input.string());
    throw UserError("there is no text (.txt, .rst, .md, .jsonl, .json, .gz of these) under [{}]",
                    fmt::join(names, ", "));
  }
  return sources;
}

std::vector<TextUnit> text_units(const std::vector<TextSource>& sources, const TextOptions& options) {
  check(options.unit_bytes > 0, "units of 0 bytes were asked for");
  constexpr std::uint64_t kEndless = std::uint64_t{1} << 62;
  std::vector<TextUnit> units;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].gzipped) {
      units.push_back({i, 0, kEndless, sources[i].size});
      continue;
    }
    for (std::uint64_t begin = 0; begin < sources[i].size; begin += options.unit_bytes) {
      const std::uint64_t end = std::min(begin + options.unit_bytes, sources[i].size);
      units.push_back({i, begin, end, end - begin});
    }
  }
  return units;
}

void require_few_bad_lines(const TextStatistics& statistics, const TextOptions& options) {
  const double share = options.max_bad_fraction * static_cast<double>(statistics.lines);
  const double handful = std::min(10.0, static_cast<double>(statistics.lines) / 10);
  if (static_cast<double>(statistics.bad_lines) <= std::max(share, handful)) return;
  throw UserError("{} of {} lines are unusable, more than the allowed share of {}; mend or leave out: {}{}",
                  statistics.bad_lines, statistics.lines, options.max_bad_fraction,
                  fmt::join(statistics.first_bad, "; "),
                  statistics.bad_lines > statistics.first_bad.size() ? "; ..." : "");
}

bool is_utf8(std::string_view bytes) {
  const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
  const auto* const end = p + bytes.size();
  while (p < end) {
    std::uint64_t word = 0;
    while (end - p >= 8 && (std::memcpy(&word, p, 8), (word & 0x8080808080808080) == 0)) p += 8;
    if (p == end) break;
    const unsigned lead = *p;
    if (lead < 0x80) {
      ++p;
      continue;
    }
    const int tail = lead >= 0xC2 && lead <= 0xDF   ? 1
                     : (lead & 0xF0) == 0xE0        ? 2
                     : lead >= 0xF0 && lead <= 0xF4 ? 3
                                                    : 0;
    if (tail == 0 || end - p <= tail) return false;
    // The second byte's range excludes overlong forms (E0, F0), surrogates (ED) and what lies above U+10FFFF
    // (F4).
    const unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (p[1] < low || p[1] > high) return false;
    for (int i = 2; i <= tail; ++i) {
      if ((p[i] & 0xC0) != 0x80) return false;
    }
    p += tail + 1;
  }
  return true;
}

// The lines of a unit, one at a time.
class TextReader::Lines {
 public:
  Lines(const TextSource& source, const TextUnit& unit, std::uint64_t max_line_bytes)
      : end_(unit.end), limit_(max_line_bytes), block_(kBlock) {
    if (source.gzipped) {
      stream_ = std::make_unique<GzipStream>(source.path);
    } else if (unit.begin == 0) {
      stream_ = std::make_unique<PlainStream>(source.path, 0);
    } else {
      // The line that the byte before the unit belongs to is the unit's before.
      stream_ = std::make_unique<PlainStream>(source.path, unit.begin - 1);
      position_ = unit.begin - 1;
      take_line();
    }
    first_ = position_;
  }

  // Moves to the next line that starts before `bound` (and before the unit's end).
  bool next(std::uint64_t bound) {
    if (position_ >= std::min(bound, end_)) return false;
    offset_ = position_;
    ++number_;
    if (take_line()) return true;
    --number_;
    return false;
  }
  const std::string& line() const { return line_; }  // without its newline
  bool too_long() const { return too_long_; }
  std::uint64_t offset() const { return offset_; }      // of the line
  std::uint64_t position() const { return position_; }  // of the line after it
  std::uint64_t number() const { return number_; }      // in the unit, from 1
  std::uint64_t first() const { return first_; }        // offset of the unit's first line

 private:
  // Reads up to and over the next newline; false where nothing is left.
  bool take_line() {
    line_.clear();
    too_long_ = false;
    bool any = false;
    for (;;) {
      if (used_ == filled_) {
        filled_ = stream_->read(block_);
        used_ = 0;
        if (filled_ == 0) return any;
      }
      any = true;
      const char* const begin = block_.data() + used_;
      const void* const newline = std::memchr(begin, '\n', filled_ - used_);
      const std::size_t length =
          newline ? static_cast<std::size_t>(static_cast<const char*>(newline) - begin) : filled_ - used_;
      if (line_.size() + length > limit_) too_long_ = true;
      if (!too_long_) line_.append(begin, length);
      const std::size_t step = length + (newline ? 1 : 0);
      used_ += step;
      position_ += step;
      if (newline) return true;
    }
  }

  std::unique_ptr<ByteStream> stream_;
  std::uint64_t end_;
  std::uint64_t limit_;
  std::vector<char> block_;
  std::size_t used_ = 0;
  std::size_t filled_ = 0;
  std::string line_;
  bool too_long_ = false;
  std::uint64_t position_ = 0;
  std::uint64_t offset_ = 0;
  std::uint64_t number_ = 0;
  std::uint64_t first_ = 0;
};

TextReader::TextReader(const TextSource& source, const TextUnit& unit, const TextOptions& options)
    : source_(source),
      unit_(unit),
      options_(options),
      lines_(std::make_unique<Lines>(source, unit, options.max_line_bytes)) {}

TextReader::~TextReader() = default;

std::optional<Document> TextReader::next() {
  Document document;
  const bool found = source_.json_lines ? next_json(document) : next_text(document);
  if (!found) return std::nullopt;
  ++statistics_.documents;
  return document;
}

std::optional<std::string_view> TextReader::line_defect() const {
  if (lines_->too_long()) return "the line is too long";
  if (!is_utf8(lines_->line())) return "the line is not UTF-8";
  return std::nullopt;
}

bool TextReader::next_json(Document& document) {
  while (lines_->next(unit_.end)) {
    const std::string& line = lines_->line();
    ++statistics_.lines;
    statistics_.bytes += lines_->position() - lines_->offset();
    if (const auto defect = line_defect()) {
      count_bad(*defect);
      continue;
    }
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto value = parse_json_or_discard(line);
    if (value.is_discarded()) {
      count_bad("malformed JSON");
      continue;
    }
    const auto text = value.is_object() ? value.find("text") : value.end();
    if (text == value.end() || !text->is_string()) {
      count_bad("no JSON object with a string \"text\"");
      continue;
    }
    document.text = std::move(text->get_ref<std::string&>());
    document.offset = lines_->offset();
    if (!document.text.empty()) return true;
  }
  return false;
}

bool TextReader::next_text(Document& document) {
  const bool whole = options_.document == TextDocument::kFile;
  while (lines_->position() < unit_.end) {
    document.text.clear();
    document.offset = lines_->position();
    const std::uint64_t bound =
        whole ? (document.offset / options_.unit_bytes + 1) * options_.unit_bytes : unit_.end;
    bool any = false;
    while (lines_->next(bound)) {
      any = true;
      ++statistics_.lines;
      statistics_.bytes += lines_->position() - lines_->offset();
      std::string_view line = lines_->line();
      if (lines_->offset() == 0 && line.starts_with(kByteOrderMark))
        line.remove_prefix(kByteOrderMark.size());
      if (const auto defect = line_defect()) {
        count_bad(*defect);
      } else {
        document.text.append(line).push_back('\n');
      }
      if (!whole) break;
    }
    if (!any) return false;
    if (document.text.find_first_not_of(" \t\r\n") != std::string::npos) return true;
  }
  return false;
}

void TextReader::count_bad(std::string_view reason) {
  ++statistics_.bad_lines;
  if (statistics_.first_bad.size() >= TextStatistics::kMaxMessages) return;
  // Counting the lines before the unit costs a read of the file up to it; only messages need it.
  const std::uint64_t before = lines_->first() > 0 ? count_newlines(source_.path, lines_->first()) : 0;
  statistics_.first_bad.push_back(
      fmt::format("{}:{}: {}", source_.path.string(), before + lines_->number(), reason));
}

}  // namespace regroup
