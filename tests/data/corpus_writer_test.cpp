#include "data/corpus_writer.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include "tests/data/corpus_fixture.h"

namespace regroup {
namespace {

using test::contents;
using test::error_of;
using test::prepare_together;
using test::write_bytes;

class CorpusWriter : public ::testing::Test {
 protected:
  void SetUp() override {
    options_.tokenizer = test::make_vocabulary(folder_);
    options_.inputs = {folder_ / "text"};
    options_.output = folder_ / "corpus";
    options_.heldout_fraction = 0.2;
    options_.shard_tokens = 1000;
    options_.text.unit_bytes = 2000;
    for (std::uint64_t i = 0; i < 30; ++i) {
      write_bytes(folder_ / fmt::format("text/{}.txt", i), test::make_text(i, static_cast<int>(i * i % 400)));
    }
    std::string lines;
    for (std::uint64_t i = 0; i < 60; ++i) {
      std::string text = test::make_text(100 + i, 20);
      text.pop_back();
      std::replace(text.begin(), text.end(), '\n', ' ');
      lines += fmt::format("{{\"text\": \"{}\"}}\n", text);
    }
    write_bytes(folder_ / "text/more.jsonl", lines);
    const gzFile file = gzopen((folder_ / "text/zipped.jsonl.gz").c_str(), "wb");
    gzwrite(file, lines.data(), static_cast<unsigned>(lines.size()));
    gzclose(file);
  }
  std::vector<std::int32_t> tokens_of(const Corpus& corpus, Split split) const {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(corpus.tokens(split)));
    corpus.read(split, 0, tokens);
    return tokens;
  }
  std::vector<std::string> left_behind() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
      const auto name = entry.path().filename().string();
      if (name.starts_with("corpus")) names.push_back(name);
    }
    return names;
  }

  test::TemporaryFolder folder_;
  CorpusOptions options_;
};

TEST_F(CorpusWriter, WritesTheSameBytesForAnyNumberOfParts) {
  prepare_corpus(options_);
  const auto expected = contents(options_.output);
  EXPECT_GT(expected.size(), 10U);
  for (const int parts : {2, 3, 5}) {
    options_.output = folder_ / fmt::format("corpus-{}", parts);
    const auto outcome = prepare_together(options_, parts);
    for (const auto& error : outcome.errors) EXPECT_EQ(error, "");
    EXPECT_EQ(contents(options_.output), expected) << parts;
    for (const auto& result : outcome.results)
      EXPECT_EQ(to_json(result.manifest), expected.at("manifest.json"));
  }
  EXPECT_EQ(left_behind().size(), 4U);
}

TEST_F(CorpusWriter, HoldsEveryDocumentOnceInOrder) {
  prepare_corpus(options_);
  const Corpus corpus(options_.output);
  corpus.verify();
  const Tokenizer tokenizer(corpus.tokenizer_file());
  // What the documents should be, by reading the text in one piece.
  std::vector<std::vector<std::int32_t>> expected;
  const auto sources = find_text(options_.inputs);
  for (const auto& unit : text_units(sources, options_.text)) {
    TextReader reader(sources[unit.source], unit, options_.text);
    while (const auto document = reader.next()) expected.push_back(tokenizer.encode(document->text));
  }
  std::erase_if(expected, [](const auto& ids) { return ids.empty(); });
  std::array<std::vector<std::vector<std::int32_t>>, 2> found;
  for (const Split split : kSplits) {
    std::vector<std::int64_t> starts;
    for (std::size_t shard = 0; shard < corpus.manifest().shards(split).size(); ++shard) {
      const auto more = corpus.document_starts(split, shard);
      starts.insert(starts.end(), more.begin(), more.end());
    }
    const auto tokens = tokens_of(corpus, split);
    starts.push_back(static_cast<std::int64_t>(tokens.size()));
    for (std::size_t i = 0; i + 1 < starts.size(); ++i) {
      found[static_cast<std::size_t>(split)].emplace_back(tokens.begin() + starts[i],
                                                          tokens.begin() + starts[i + 1]);
    }
  }
  EXPECT_EQ(found[0].size() + found[1].size(), expected.size());
  EXPECT_GT(found[1].size(), expected.size() / 20);  // 0.2 of some 170, by hash
  EXPECT_LT(found[1].size(), expected.size() / 2);
  // Both splits together, merged in order, are the documents.
  std::array<std::size_t, 2> at{};
  for (const auto& document : expected) {
    const std::size_t split = at[0] < found[0].size() && found[0][at[0]] == document ? 0 : 1;
    ASSERT_LT(at[split], found[split].size());
    ASSERT_EQ(found[split][at[split]++], document);
  }
}

TEST_F(CorpusWriter, DoesNotDependOnWhereTheTextLies) {
  prepare_corpus(options_);
  const auto expected = contents(options_.output);
  std::filesystem::create_directories(folder_ / "elsewhere");
  std::filesystem::rename(folder_ / "text", folder_ / "elsewhere/text");
  options_.inputs = {folder_ / "elsewhere/text/"};
  options_.output = folder_ / "corpus-2";
  prepare_corpus(options_);
  EXPECT_EQ(contents(options_.output), expected);
}

TEST_F(CorpusWriter, LeavesTheSameCorpusAloneAndOthersUnlessTold) {
  EXPECT_FALSE(prepare_corpus(options_).was_there);
  const auto before = contents(options_.output);
  const auto again = prepare_together(options_, 2);
  EXPECT_TRUE(again.results[0].was_there && again.results[1].was_there);
  options_.heldout_fraction = 0.4;
  EXPECT_NE(error_of([&] { prepare_corpus(options_); }).find("--overwrite"), std::string::npos);
  EXPECT_EQ(contents(options_.output), before);
  options_.overwrite = true;
  EXPECT_FALSE(prepare_corpus(options_).was_there);
  EXPECT_NE(contents(options_.output), before);
  EXPECT_EQ(left_behind(), std::vector<std::string>{"corpus"});
  // A damaged corpus says so, and can be replaced.
  std::filesystem::resize_file(options_.output / "tokens-00000.bin", 10);
  options_.overwrite = false;
  EXPECT_NE(error_of([&] { prepare_corpus(options_); }).find("tokens-00000.bin has 10 bytes"),
            std::string::npos);
  options_.overwrite = true;
  prepare_corpus(options_);
  Corpus(options_.output).verify();
  // A folder that is no corpus is never touched.
  options_.output = folder_ / "text";
  EXPECT_NE(error_of([&] { prepare_corpus(options_); }).find("holds no corpus"), std::string::npos);
}

TEST_F(CorpusWriter, TakesOverWhatAKilledRunLeft) {
  write_bytes(folder_ / "corpus.partial/part-00000.train.tokens", "rest");
  write_bytes(folder_ / "corpus.partial/rest", "rest");
  prepare_corpus(options_);
  EXPECT_EQ(left_behind(), std::vector<std::string>{"corpus"});
  EXPECT_FALSE(contents(options_.output).contains("rest"));
}

TEST_F(CorpusWriter, LeavesNothingBehindWhereThePartsFail) {
  // One damaged file among many: every part names it.
  auto bytes = test::read_bytes(folder_ / "text/zipped.jsonl.gz");
  write_bytes(folder_ / "text/zipped.jsonl.gz", bytes.substr(0, bytes.size() / 2));
  for (const auto& error : prepare_together(options_, 3).errors) {
    EXPECT_NE(error.find("zipped.jsonl.gz is truncated"), std::string::npos) << error;
  }
  EXPECT_TRUE(left_behind().empty());
  std::filesystem::remove(folder_ / "text/zipped.jsonl.gz");
  // Parts that do not see the same.
  const auto differing = prepare_together(options_, 2, [&](int part, CorpusOptions& own) {
    if (part == 1) own.inputs.push_back(folder_ / "text/1.txt");
  });
  for (const auto& error : differing.errors)
    EXPECT_NE(error.find("different input files"), std::string::npos) << error;
  EXPECT_TRUE(left_behind().empty());
}

TEST_F(CorpusWriter, RefusesMostlyBadText) {
  std::string lines;
  for (int i = 0; i < 500; ++i) lines += i % 5 == 4 ? "{\"text\": \"\xC3\x28\"}\n" : "{\"text\": \"kato\"}\n";
  write_bytes(folder_ / "text/bad.jsonl", lines);
  options_.text.unit_bytes = 1500;
  for (const auto& error : prepare_together(options_, 3).errors) {
    EXPECT_NE(error.find("lines are unusable"), std::string::npos) << error;
    EXPECT_NE(error.find("bad.jsonl:5: the line is not UTF-8; "), std::string::npos) << error;
  }
  EXPECT_TRUE(left_behind().empty());
  options_.text.max_bad_fraction = 0.5;
  const auto outcome = prepare_together(options_, 2);
  EXPECT_EQ(outcome.errors[0], "");
  EXPECT_EQ(outcome.results[1].statistics.bad_lines, 100U);
  EXPECT_EQ(outcome.results[1].manifest.statistics.bad_lines, 100U);
  EXPECT_EQ(outcome.results[1].statistics.first_bad, outcome.results[0].statistics.first_bad);
}

TEST_F(CorpusWriter, RefusesImpossibleRequests) {
  const auto error = [&] { return error_of([&] { prepare_corpus(options_); }); };
  options_.output = "/proc/no/corpus";
  EXPECT_NE(error().find("/proc/no/corpus"), std::string::npos);
  options_.output = folder_ / "vocabulary.txt";
  EXPECT_NE(error().find("in the way"), std::string::npos);
  options_.output = folder_ / "corpus";
  options_.heldout_fraction = 1;
  EXPECT_NE(error().find("held-out fraction"), std::string::npos);
  options_.heldout_fraction = 0;
  write_bytes(folder_ / "blank.txt", " \n \n");
  options_.inputs = {folder_ / "blank.txt"};
  EXPECT_NE(error().find("no token"), std::string::npos);
  options_.tokenizer = folder_ / "blank.txt";
  EXPECT_NE(error().find("not a SentencePiece model"), std::string::npos);
  EXPECT_TRUE(left_behind().empty());
}

}  // namespace
}  // namespace regroup
