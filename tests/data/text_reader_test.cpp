#include "data/text_reader.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include "tests/data/fixture.h"

namespace regroup {
namespace {

using test::error_of;
using test::TemporaryFolder;
using test::write_bytes;

std::string gzip(const TemporaryFolder& folder, const std::string& bytes) {
  const auto path = folder / "scratch-of-gzip";
  const gzFile file = gzopen(path.c_str(), "wb");
  gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size()));
  gzclose(file);
  return test::read_bytes(path);
}

struct Read {
  std::vector<Document> documents;
  TextStatistics statistics;
  std::vector<std::string> texts() const {
    std::vector<std::string> result;
    for (const auto& document : documents) result.push_back(document.text);
    return result;
  }
};

Read read_all(const std::vector<std::filesystem::path>& inputs, const TextOptions& options = {}) {
  Read result;
  const auto sources = find_text(inputs);
  for (const auto& unit : text_units(sources, options)) {
    TextReader reader(sources[unit.source], unit, options);
    while (auto document = reader.next()) result.documents.push_back(std::move(*document));
    result.statistics.add(reader.statistics());
  }
  return result;
}

using Texts = std::vector<std::string>;

TEST(Utf8, IsTheStandards) {
  for (const char* good : {"", "plain", "caf\xC3\xA9", "\xE4\xB8\xAD", "\xF0\x9F\x98\x80", "\xF4\x8F\xBF\xBF",
                           "\xED\x9F\xBF", "\xEE\x80\x80", "eight bytes and \xC3\xA9 more of them"}) {
    EXPECT_TRUE(is_utf8(good)) << good;
  }
  for (const char* bad :
       {"\x80", "\xC3", "\xC0\xAF", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "eight bytes and \xE4\xB8",
        "\xE4\xB8"
        "abc"}) {
    EXPECT_FALSE(is_utf8(bad));
  }
}

TEST(TextReader, ReadsEveryFormat) {
  const TemporaryFolder folder;
  const std::string lines =
      "{\"text\": \"one\\n\\u00e9\"}\n\n{\"id\": 1, \"text\": \"two\", \"more\": {\"text\": "
      "3}}\r\n{\"text\": \"\"}\n{\"text\": \"last\"}";
  write_bytes(folder / "a.jsonl", lines);
  write_bytes(folder / "b.json.gz", gzip(folder, lines));
  write_bytes(folder / "c.txt", "\xEF\xBB\xBFhello\nworld\n");
  write_bytes(folder / "d.rst.gz", gzip(folder, "hello\nworld"));
  const Texts objects = {"one\n\xC3\xA9", "two", "last"};
  EXPECT_EQ(read_all({folder / "a.jsonl"}).texts(), objects);
  EXPECT_EQ(read_all({folder / "b.json.gz"}).texts(), objects);
  EXPECT_EQ(read_all({folder / "c.txt"}).texts(), Texts{"hello\nworld\n"});
  EXPECT_EQ(read_all({folder / "d.rst.gz"}).texts(), Texts{"hello\nworld\n"});
  EXPECT_EQ(read_all({folder / "d.rst.gz", folder / "c.txt"}, {.document = TextDocument::kLine}).texts(),
            (Texts{"hello\n", "world\n", "hello\n", "world\n"}));
  EXPECT_EQ(read_all({folder / "a.jsonl"}).documents[2].offset, lines.rfind('{'));
  EXPECT_EQ(read_all({folder / "a.jsonl"}).statistics.lines, 5U);
}

TEST(TextReader, FindsFilesInByteOrder) {
  const TemporaryFolder folder;
  for (const char* name :
       {"docs/b.txt", "docs/a/z.rst", "docs/a.md", "docs/ignored.png", "docs/B.txt", "docs/c.txt.gz"}) {
    write_bytes(folder / name, "x\n");
  }
  std::vector<std::string> names;
  for (const auto& source : find_text({folder / "docs/", folder / "docs/a/z.rst"}))
    names.push_back(source.name);
  EXPECT_EQ(names, (std::vector<std::string>{"docs/B.txt", "docs/a.md", "docs/a/z.rst", "docs/b.txt",
                                             "docs/c.txt.gz", "z.rst"}));
  EXPECT_NE(error_of([&] { find_text({folder / "docs/ignored.png"}); }).find(".jsonl"), std::string::npos);
  EXPECT_NE(error_of([&] { find_text({folder / "nowhere"}); }).find("nowhere"), std::string::npos);
  std::filesystem::create_directories(folder / "empty");
  EXPECT_NE(error_of([&] { find_text({folder / "empty"}); }).find("empty"), std::string::npos);
}

TEST(TextReader, UnitsCoverEveryLineOnce) {
  const TemporaryFolder folder;
  std::string lines;
  Texts expected;
  for (int i = 0; i < 200; ++i) {
    expected.push_back(
        std::string(static_cast<std::size_t>(i * 37 % 50 + 1), static_cast<char>('a' + i % 26)));
    lines += "{\"text\": \"" + expected.back() + "\"}\n";
  }
  write_bytes(folder / "a.jsonl", lines);
  for (const std::uint64_t bytes : {1U, 7U, 13U, 64U, 500U, 100000U}) {
    const auto read = read_all({folder / "a.jsonl"}, {.unit_bytes = bytes});
    EXPECT_EQ(read.texts(), expected) << bytes;
    EXPECT_EQ(read.statistics.bytes, lines.size());
    EXPECT_EQ(read.statistics.lines, 200U);
  }
}

TEST(TextReader, CutsLongTextFilesAtTheSameLinesZippedOrNot) {
  const TemporaryFolder folder;
  const std::string text = test::make_text(5, 2000);
  write_bytes(folder / "a.txt", text);
  write_bytes(folder / "b.txt.gz", gzip(folder, text));
  const TextOptions options{.unit_bytes = 700};
  const auto plain = read_all({folder / "a.txt"}, options).texts();
  EXPECT_GT(plain.size(), 10U);
  EXPECT_EQ(plain, read_all({folder / "b.txt.gz"}, options).texts());
  std::string joined;
  for (const auto& part : plain) joined += part;
  EXPECT_EQ(joined, text);
}

TEST(TextReader, CountsBadLinesWithTheirPlace) {
  const TemporaryFolder folder;
  std::string lines;
  for (int i = 1; i <= 400; ++i) {
    lines += i == 123   ? "{\"text\": \"cut off\n"
             : i == 222 ? "{\"text\": \"\xFF\"}\n"
             : i == 300 ? "{\"txt\": \"?\"}\n"
             : i == 301 ? "[1, 2]\n"
             : i == 399 ? "{\"text\": \"" + std::string(2000, 'x') + "\"}\n"
                        : "{\"text\": \"fine\"}\n";
  }
  const auto path = folder / "a.jsonl";
  write_bytes(path, lines);
  for (const std::uint64_t bytes : {300U, 100000U}) {
    const TextOptions options{.max_line_bytes = 1000, .unit_bytes = bytes};
    const auto read = read_all({path}, options);
    EXPECT_EQ(read.statistics.bad_lines, 5U);
    EXPECT_EQ(read.documents.size(), 395U);
    EXPECT_EQ(read.statistics.first_bad,
              (std::vector<std::string>{path.string() + ":123: malformed JSON",
                                        path.string() + ":222: the line is not UTF-8",
                                        path.string() + ":300: no JSON object with a string \"text\"",
                                        path.string() + ":301: no JSON object with a string \"text\"",
                                        path.string() + ":399: the line is too long"}));
    EXPECT_NO_THROW(require_few_bad_lines(read.statistics, options));
  }
}

TEST(TextReader, RefusesTextThatIsMostlyBad) {
  const TemporaryFolder folder;
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += i % 50 == 7 ? "oops\n" : "{\"text\": \"fine\"}\n";
  write_bytes(folder / "a.jsonl", lines);
  const auto read = read_all({folder / "a.jsonl"});
  const auto message = error_of([&] { require_few_bad_lines(read.statistics, {}); });
  EXPECT_NE(message.find("20 of 1000 lines"), std::string::npos) << message;
  EXPECT_NE(message.find("a.jsonl:8: malformed JSON"), std::string::npos) << message;
  EXPECT_NO_THROW(require_few_bad_lines(read.statistics, {.max_bad_fraction = 0.02}));
  write_bytes(folder / "pretty.json", "[\n {\"text\":\n \"a\"}\n]\n");
  const auto pretty = read_all({folder / "pretty.json"});
  EXPECT_NE(error_of([&] { require_few_bad_lines(pretty.statistics, {}); }).find("pretty.json:1"),
            std::string::npos);
}

TEST(TextReader, LeavesOutTextLinesThatAreNotUtf8) {
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 40; ++i) text += "good line\n";
  write_bytes(folder / "a.txt", text + "caf\xE9\n" + text);
  const auto read = read_all({folder / "a.txt"});
  EXPECT_EQ(read.texts(), Texts{text + text});
  ASSERT_EQ(read.statistics.bad_lines, 1U);
  EXPECT_NE(read.statistics.first_bad[0].find("a.txt:41: the line is not UTF-8"), std::string::npos);
}

TEST(TextReader, RefusesDamagedGzip) {
  const TemporaryFolder folder;
  const std::string whole = gzip(folder, test::make_text(3, 30000));
  for (const std::size_t length : {std::size_t{12}, whole.size() / 2, whole.size() - 9, whole.size() - 1}) {
    write_bytes(folder / "cut.txt.gz", whole.substr(0, length));
    EXPECT_NE(error_of([&] { read_all({folder / "cut.txt.gz"}); }).find("cut.txt.gz is truncated"),
              std::string::npos)
        << length;
  }
  std::string flipped = whole;
  flipped[flipped.size() - 6] ^= 1;  // of the CRC
  write_bytes(folder / "flipped.txt.gz", flipped);
  EXPECT_NE(error_of([&] { read_all({folder / "flipped.txt.gz"}); }).find("flipped.txt.gz is damaged"),
            std::string::npos);
  write_bytes(folder / "plain.txt.gz", "not zipped\n");
  EXPECT_NE(error_of([&] { read_all({folder / "plain.txt.gz"}); }).find("not a gzip file"),
            std::string::npos);
  write_bytes(folder / "empty.txt.gz", gzip(folder, ""));
  EXPECT_TRUE(read_all({folder / "empty.txt.gz"}).documents.empty());
}

TEST(TextReader, ReadsRealC4) {
  REGROUP_NEEDS_SHARED("c4-train.sample.json.gz");
  const auto read = read_all({test::shared("c4-train.sample.json.gz")});
  EXPECT_EQ(read.statistics.bad_lines, 0U);
  EXPECT_GT(read.documents.size(), 100U);
  EXPECT_EQ(read.statistics.lines, read.documents.size());
}

}  // namespace
}  // namespace regroup
