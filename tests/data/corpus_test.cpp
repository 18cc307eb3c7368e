#include "data/corpus.h"

#include <gtest/gtest.h>

#include "tests/data/corpus_fixture.h"

namespace regroup {
namespace {

using test::error_of;
using test::TemporaryFolder;
using test::write_bytes;

TEST(Corpus, ReadsAnyRangeAcrossShards) {
  const TemporaryFolder folder;
  const auto all = test::random_tokens(1000, 1);
  const auto part = [&](int begin, int end) { return std::vector(all.begin() + begin, all.begin() + end); };
  test::write_corpus(folder / "c", {part(0, 300), part(300, 301), part(301, 1000)}, {part(10, 60)});
  const Corpus corpus(folder / "c");
  EXPECT_EQ(corpus.tokens(Split::kTrain), 1000);
  EXPECT_EQ(corpus.tokens(Split::kHeldout), 50);
  EXPECT_EQ(corpus.vocab_size(), 1152);
  EXPECT_EQ(corpus.manifest().first_sentinel(), 1099);
  EXPECT_NO_THROW(corpus.verify());
  for (const auto& [begin, count] :
       {std::pair{0, 1000}, {0, 300}, {299, 3}, {300, 1}, {301, 10}, {999, 1}, {1000, 0}}) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(count));
    corpus.read(Split::kTrain, begin, out);
    for (int i = 0; i < count; ++i)
      EXPECT_EQ(out[static_cast<std::size_t>(i)], all[static_cast<std::size_t>(begin + i)]);
  }
  std::vector<std::int32_t> out(2);
  corpus.read(Split::kHeldout, 48, out);
  EXPECT_EQ(out[1], all[59]);
  EXPECT_THROW(corpus.read(Split::kHeldout, 49, out), InternalError);
  EXPECT_THROW(corpus.read(Split::kHeldout, -1, out), InternalError);
  EXPECT_EQ(corpus.document_starts(Split::kTrain, 2), std::vector<std::int64_t>{301});
}

TEST(Corpus, NamesWhatIsMissingOrOfAnotherSize) {
  const TemporaryFolder folder;
  const auto make = [&] { test::write_corpus(folder / "c", {test::random_tokens(500, 1)}, {}); };
  const auto open = [&] { const Corpus corpus(folder / "c"); };
  EXPECT_NE(error_of(open).find("--prepare-data"), std::string::npos);
  make();
  EXPECT_NO_THROW(open());
  std::filesystem::resize_file(folder / "c/tokens-00000.bin", 998);
  EXPECT_NE(error_of(open).find("tokens-00000.bin has 998 bytes where its manifest says 1000"),
            std::string::npos);
  std::filesystem::remove(folder / "c/tokens-00000.bin");
  EXPECT_NE(error_of(open).find("cannot read"), std::string::npos);
  make();
  std::filesystem::resize_file(folder / "c/documents-00000.bin", 0);
  EXPECT_NE(error_of(open).find("documents-00000.bin has 0 bytes"), std::string::npos);
}

TEST(Corpus, VerifyFindsEveryFlippedBit) {
  const TemporaryFolder folder;
  const auto make = [&] {
    test::write_corpus(folder / "c", {test::random_tokens(500, 1)}, {test::random_tokens(50, 2)});
  };
  for (const char* name :
       {"tokens-00000.bin", "tokens-00001.bin", "documents-00001.bin", "tokenizer.model"}) {
    make();
    auto bytes = test::read_bytes(folder / "c" / name);
    bytes[bytes.size() / 2] ^= 0x10;
    write_bytes(folder / "c" / name, bytes);
    const Corpus corpus(folder / "c");
    EXPECT_NE(error_of([&] { corpus.verify(); }).find(name), std::string::npos) << name;
  }
  make();
  write_bytes(folder / "c/tokens-00001.bin", std::string(100, 'x'));
  const Corpus corpus(folder / "c");
  EXPECT_NO_THROW(corpus.verify(0, 2));
  EXPECT_NE(error_of([&] { corpus.verify(1, 2); }).find("tokens-00001.bin"), std::string::npos);
}

TEST(Corpus, VerifyBeatsForEveryMegabyte) {
  const TemporaryFolder folder;
  test::write_corpus(folder / "c", {test::random_tokens(2'000'000, 1)}, {});
  Heartbeat heartbeat;
  Corpus(folder / "c").verify(0, 1, &heartbeat);
  EXPECT_GE(heartbeat.state().beats, 4U);
  EXPECT_EQ(heartbeat.state().operation, "checking the corpus");
}

TEST(Corpus, RefusesTokensOutsideTheVocabulary) {
  const TemporaryFolder folder;
  test::write_corpus(folder / "c", {{5, 6, 999, 1000, 7}}, {});
  const Corpus corpus(folder / "c");
  std::vector<std::int32_t> out(3);
  EXPECT_NO_THROW(corpus.read(Split::kTrain, 0, out));
  EXPECT_NE(error_of([&] { corpus.read(Split::kTrain, 1, out); }).find("holds the token 1000"),
            std::string::npos);
}

class ManifestText : public ::testing::Test {
 protected:
  void SetUp() override {
    test::write_corpus(folder_ / "c", {test::random_tokens(500, 1)}, {test::random_tokens(50, 2)});
    text_ = test::read_bytes(folder_ / "c" / kManifestFile);
  }
  // The error after `from` became `to` in the manifest.
  std::string edited(const std::string& from, const std::string& to) const {
    std::string text = text_;
    const auto at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    const std::string message = error_of([&] { parse_manifest(text, "some/manifest.json"); });
    EXPECT_EQ(message.find("some/manifest.json"), 0U) << message;
    return message;
  }

  const TemporaryFolder folder_;
  std::string text_;
};

TEST_F(ManifestText, IsTheInverseOfJson) { EXPECT_EQ(to_json(parse_manifest(text_, "m")), text_); }

TEST_F(ManifestText, RefusesHostileValues) {
  const std::vector<std::pair<std::string, std::string>> edits = {
      {"\"tokens\": 500", "\"tokens\": -500"},
      {"\"tokens\": 500", "\"tokens\": 0"},
      {"\"tokens\": 500", "\"tokens\": 500.5"},
      {"\"tokens\": 500", "\"tokens\": 5e2"},
      {"\"tokens\": 500", "\"tokens\": \"500\""},
      {"\"tokens\": 500", "\"tokens\": null"},
      {"\"tokens\": 500", "\"tokens\": 18446744073709551615"},
      {"\"tokens\": 500", "\"tokens\": 99999999999999999999999"},
      {"\"tokens\": 500", "\"tokens\": 9223372036854775808"},
      {"\"documents\": 1", "\"documents\": 501"},
      {"\"tokens-00000.bin\"", "\"../tokens-00000.bin\""},
      {"\"tokens-00000.bin\"", "\"/etc/passwd\""},
      {"\"tokens-00000.bin\"", "\"..\""},
      {"\"tokens-00000.bin\"", "\"\""},
      {"\"tokens-00000.bin\"", "\"a\\u0000b\""},
      {"\"tokens-00000.bin\"", "\"tokens-00001.bin\""},
      {"\"tokens-00000.bin\"", "\"tokenizer.model\""},
      {"\"tokens-00000.bin\"", "\"manifest.json\""},
      {"\"tokens-00000.bin\"", "7"},
      {"\"tokenizer.model\"", "\"a/b\""},
      {"\"version\": 1", "\"version\": 2"},
      {"\"uint16\"", "\"uint32\""},
      {"\"uint16\"", "\"uint8\""},
      {"\"vocab_size\": 1152", "\"vocab_size\": 1153"},
      {"\"vocab_size\": 1152", "\"vocab_size\": 0"},
      {"\"vocab_size\": 1152", "\"vocab_size\": 4294967296"},
      {"\"pieces\": 1000", "\"pieces\": 5000"},
      {"\"heldout_fraction\": 0.0", "\"heldout_fraction\": 1e999"},
      {"\"heldout_fraction\": 0.0", "\"heldout_fraction\": -1"},
      {"\"train\": [", "\"train\": 3, \"x\": ["},
      {"\"train\": [", "\"train\": [[], "},
      {"\"splits\": {", "\"splits\": [], \"x\": {"},
      {"\"heldout\": [", "\"held\": ["},
      {"\"checksum\": \"", "\"checksum\": \"g"},
      {"\"regroup-corpus\"", "\"other\""},
      {"{", ""},
  };
  for (const auto& [from, to] : edits) {
    SCOPED_TRACE(from + " -> " + to);
    edited(from, to);
  }
}

TEST_F(ManifestText, RefusesEveryTruncation) {
  for (std::size_t length = 0; length + 2 < text_.size(); ++length) {
    EXPECT_THROW(parse_manifest(std::string_view(text_).substr(0, length), "m"), UserError) << length;
  }
  EXPECT_THROW(parse_manifest(std::string(100000, '['), "m"), UserError);
  EXPECT_THROW(parse_manifest("[]", "m"), UserError);
  EXPECT_THROW(parse_manifest("\xFF\xFE", "m"), UserError);
}

TEST_F(ManifestText, SaysWhatAndWhere) {
  EXPECT_NE(edited("\"tokens\": 500", "\"tokens\": -5")
                .find("\"train\" shard 0: \"tokens\" should be a whole number"),
            std::string::npos);
  EXPECT_NE(edited("\"documents_checksum\"", "\"nothing\"").find("has no \"documents_checksum\""),
            std::string::npos);
}

}  // namespace
}  // namespace regroup
