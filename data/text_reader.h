// Documents out of text and JSON-lines files, plain or gzipped.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace regroup {

// What one document of a plain text file is. JSON lines hold one document a line in any case.
enum class TextDocument { kFile, kLine };

struct TextOptions {
  TextDocument document = TextDocument::kFile;
  std::uint64_t max_line_bytes = std::uint64_t{64} << 20;  // a longer line counts as bad
  // The unit of work: a plain file is cut into units of this many bytes, each made of the lines that start in
  // it. A text file is one document as long as it is no longer than this, else one document a unit.
  std::uint64_t unit_bytes = std::uint64_t{16} << 20;
  double max_bad_fraction = 0.001;  // share of lines that may be bad, see require_few_bad_lines()
};

// A file to read. `name` is relative to the input it was found under ("docs/index.rst"), with '/', and stays
// the same wherever that input lies.
struct TextSource {
  std::filesystem::path path;
  std::string name;
  std::uint64_t size = 0;  // bytes on disk
  bool json_lines = false;
  bool gzipped = false;
};

// The lines of a source that start at [begin, end) of its (unzipped) bytes.
struct TextUnit {
  std::size_t source = 0;  // index into the sources
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t bytes = 0;  // on disk, for balance
};

struct Document {
  std::string text;          // valid UTF-8
  std::uint64_t offset = 0;  // first byte of it (of its line) in the (unzipped) source
};

// What was read. Sums over units give the same numbers however the units are dealt out.
struct TextStatistics {
  std::uint64_t documents = 0;  // handed out
  std::uint64_t lines = 0;
  std::uint64_t bytes = 0;
  std::uint64_t bad_lines = 0;         // left out: not UTF-8, malformed JSON, no "text", too long
  std::vector<std::string> first_bad;  // "file:line: reason", the first kMaxMessages of them in order

  static constexpr std::size_t kMaxMessages = 5;
  void add(const TextStatistics& later);
};

// The files of `inputs`, in the order given; folders are searched recursively, in byte order of the names,
// for .txt, .rst, .md (text), .jsonl, .json (one object a line) and .gz of these. Throws UserError for an
// input that does not exist, a file of another kind given by name, and where nothing is found.
std::vector<TextSource> find_text(const std::vector<std::filesystem::path>& inputs);

// The units of `sources`, in order; a gzipped file is one unit.
std::vector<TextUnit> text_units(const std::vector<TextSource>& sources, const TextOptions& options);

// Throws UserError with counts and the first messages where more lines were bad than
// max(max_bad_fraction * lines, min(10, lines / 10)).
void require_few_bad_lines(const TextStatistics& statistics, const TextOptions& options);

// Is `bytes` UTF-8 (no overlong forms, no surrogates, nothing above U+10FFFF)?
bool is_utf8(std::string_view bytes);

// Reads one unit, one document at a time, with memory for one document. Lines that are not UTF-8, are
// malformed JSON, have no string "text" or are too long are left out and counted with their place. Empty
// documents are skipped. Throws UserError where the file is unreadable, or its gzip stream is damaged or
// truncated.
class TextReader {
 public:
  TextReader(const TextSource& source, const TextUnit& unit, const TextOptions& options);
  ~TextReader();
  TextReader(const TextReader&) = delete;
  TextReader& operator=(const TextReader&) = delete;

  // The next document, or nothing at the end.
  std::optional<Document> next();
  const TextStatistics& statistics() const { return statistics_; }

 private:
  class Lines;

  std::optional<std::string_view> line_defect() const;  // why the current line is not text, if it is not
  bool next_json(Document& document);
  bool next_text(Document& document);
  void count_bad(std::string_view reason);

  TextSource source_;
  TextUnit unit_;
  TextOptions options_;
  std::unique_ptr<Lines> lines_;
  TextStatistics statistics_;
};

}  // namespace regroup
