#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include "tests/data/fixture.h"

namespace regroup {
namespace {

using test::error_of;
using test::TemporaryFolder;

TEST(Tokenizer, EncodesAsT5) {
  REGROUP_NEEDS_SHARED("t5_spiece.model");
  const Tokenizer t5(test::shared("t5_spiece.model"));
  using Ids = std::vector<std::int32_t>;
  EXPECT_EQ(t5.encode("The quick brown fox jumps over the lazy dog."),
            (Ids{37, 1704, 4216, 3, 20400, 4418, 7, 147, 8, 19743, 1782, 5}));
  EXPECT_EQ(t5.encode("summarize: Studies have shown that owning a dog is good for you."),
            (Ids{21603, 10, 6536, 43, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 5}));
  EXPECT_EQ(t5.encode("Thank you for inviting me to your party last week."),
            (Ids{1562, 25, 21, 14256, 140, 12, 39, 1088, 336, 471, 5}));
  EXPECT_EQ(t5.encode("translate English to German: That is good."),
            (Ids{13959, 1566, 12, 2968, 10, 466, 19, 207, 5}));
  EXPECT_EQ(
      t5.encode(
          "  Multiple   spaces\tand \xEF\xAC\x81 ligature, \xE2\x80\x9Cquotes\xE2\x80\x9D {braces} \\ ~ "
          "\xE4\xB8\xAD\xE6\x96\x87 \xC3\xA9"),
      (Ids{16821, 4856, 11,   361,  3, 17140, 2693, 6, 105, 8270, 15, 7, 153,
           3,     2,    1939, 2319, 2, 3,     2,    3, 2,   3,    2,  3, 154}));
}

TEST(Tokenizer, NumbersSentinelsAsT5) {
  REGROUP_NEEDS_SHARED("t5_spiece.model");
  const Tokenizer t5(test::shared("t5_spiece.model"));
  EXPECT_EQ(t5.piece_count(), 32000);
  EXPECT_EQ(t5.extended_size(), 32100);
  EXPECT_EQ(t5.vocab_size(), 32128);
  EXPECT_EQ(t5.sentinel(0), 32099);
  EXPECT_EQ(t5.sentinel(99), 32000);
  EXPECT_THROW(t5.sentinel(100), InternalError);
  EXPECT_EQ(t5.decode(std::vector<std::int32_t>{1562, 25, 32099, 140, 12, 32098, 471, 5, 1, 0, 0}),
            "Thank you <extra_id_0> me to <extra_id_1> week.");
  EXPECT_EQ(t5.decode(std::vector<std::int32_t>{0, 32099, 140, 32098, 1}), "<extra_id_0> me <extra_id_1>");
  EXPECT_NE(error_of([&] { t5.decode(std::vector<std::int32_t>{32128}); }).find("32128"), std::string::npos);
  EXPECT_NO_THROW(t5.decode(std::vector<std::int32_t>{32127}));
}

TEST(Tokenizer, EncodesALongTextAsItsParagraphs) {
  REGROUP_NEEDS_SHARED("t5_spiece.model");
  const Tokenizer t5(test::shared("t5_spiece.model"));
  std::string text;
  std::vector<std::int32_t> expected;
  for (int i = 0; i < 3000; ++i) {
    const std::string sentence =
        fmt::format("Sentence {} of {} is \"here\" (and there).\n", i, i * 7919 % 3001);
    text += sentence;
    const auto ids = t5.encode(sentence);
    expected.insert(expected.end(), ids.begin(), ids.end());
  }
  EXPECT_EQ(t5.encode(text), expected);
}

TEST(Tokenizer, RefusesOtherFiles) {
  const TemporaryFolder folder;
  test::write_bytes(folder / "text.model", "this is no model at all");
  test::write_bytes(folder / "empty.model", "");
  EXPECT_NE(error_of([&] { Tokenizer{folder / "text.model"}; }).find("text.model is not a SentencePiece"),
            std::string::npos);
  EXPECT_NE(error_of([&] { Tokenizer{folder / "empty.model"}; }).find("empty.model"), std::string::npos);
  EXPECT_NE(error_of([&] { Tokenizer{folder / "none.model"}; }).find("none.model"), std::string::npos);
}

// The serialized ModelProto with one more user-defined piece.
void append_piece(std::string& model, const std::string& piece) {
  std::string entry = "\x0A" + std::string(1, static_cast<char>(piece.size())) + piece;  // 1: piece
  entry += std::string("\x15\0\0\0\0", 5) + std::string("\x18\x04", 2);                  // 2: score, 3: type
  model += "\x0A" + std::string(1, static_cast<char>(entry.size())) + entry;
}

// As mT5's: sentinels are the last pieces of the model itself.
TEST(Tokenizer, CountsSentinelsThatAreTheModelsPiecesOnce) {
  const TemporaryFolder folder;
  const auto plain_path = test::make_vocabulary(folder);
  std::string model = test::read_bytes(plain_path);
  for (int i = Tokenizer::kSentinels; i-- > 0;) {
    append_piece(model, fmt::format("\xE2\x96\x81<extra_id_{}>", i));
  }
  test::write_bytes(folder / "own.model", model);
  const Tokenizer plain(plain_path);
  const Tokenizer own(folder / "own.model");
  EXPECT_FALSE(plain.holds_sentinels());
  EXPECT_TRUE(own.holds_sentinels());
  EXPECT_EQ(own.piece_count(), plain.piece_count());
  EXPECT_EQ(own.extended_size(), plain.extended_size());
  EXPECT_EQ(own.vocab_size(), plain.vocab_size());
  EXPECT_EQ(own.sentinel(0), plain.sentinel(0));
  const std::vector<std::int32_t> ids = {5, own.sentinel(7), 6, own.sentinel(0)};
  EXPECT_EQ(own.decode(ids), plain.decode(ids));
  for (const std::int32_t id : own.encode("a text with <extra_id_3> in it")) EXPECT_LT(id, own.piece_count());
}

TEST(TokenizerTraining, GivesT5sIdsAndTheSameFileTwice) {
  const TemporaryFolder folder;
  const auto model = test::make_vocabulary(folder);
  const Tokenizer tokenizer(model);
  EXPECT_EQ(tokenizer.piece_count(), 120);
  EXPECT_EQ(tokenizer.extended_size(), 220);
  EXPECT_EQ(tokenizer.vocab_size(), 256);
  EXPECT_EQ(tokenizer.sentinel(0), 219);
  EXPECT_EQ(tokenizer.sentinel(99), 120);
  const std::string text = "kato miran seldu vor. neplost";
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  for (const auto id : tokenizer.encode(text)) {
    EXPECT_GT(id, Tokenizer::kUnknown);
    EXPECT_LT(id, tokenizer.piece_count());
  }
  train_tokenizer({folder / "vocabulary.txt"}, folder / "again.model", {.vocab_pieces = 120});
  EXPECT_EQ(test::read_bytes(model), test::read_bytes(folder / "again.model"));
  EXPECT_EQ(Tokenizer(folder / "again.model").checksum(), tokenizer.checksum());
}

TEST(TokenizerTraining, DrawsNoMoreSentencesThanAsked) {
  const TemporaryFolder folder;
  test::write_bytes(folder / "a.txt", test::make_text(1, 20000));
  const TokenizerTraining options{.vocab_pieces = 100, .max_sentences = 200, .seed = 3};
  train_tokenizer({folder / "a.txt"}, folder / "one.model", options);
  train_tokenizer({folder / "a.txt"}, folder / "two.model", options);
  EXPECT_EQ(test::read_bytes(folder / "one.model"), test::read_bytes(folder / "two.model"));
}

TEST(TokenizerTraining, ExplainsWhatCannotBeTrained) {
  const TemporaryFolder folder;
  test::write_bytes(folder / "short.txt", "a few words only, and then a few words more\n");
  test::write_bytes(folder / "blank.txt", " \n\n");
  const auto train = [&](const char* text, std::int32_t pieces) {
    return error_of(
        [&] { train_tokenizer({folder / text}, folder / "out.model", {.vocab_pieces = pieces}); });
  };
  EXPECT_NE(train("short.txt", 5000).find("too small for 5000 pieces; ask for at most"), std::string::npos)
      << train("short.txt", 5000);
  EXPECT_NE(train("short.txt", 16).find("fewer than the characters"), std::string::npos)
      << train("short.txt", 16);
  EXPECT_NE(train("blank.txt", 100).find("no text"), std::string::npos);
  EXPECT_NE(train("absent.txt", 100).find("absent.txt"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "out.model"));
  test::write_bytes(folder / "good.txt", test::make_text(1, 4000));
  EXPECT_NE(error_of([&] {
              train_tokenizer({folder / "good.txt"}, folder / "no" / "out.model", {.vocab_pieces = 100});
            }).find("out.model"),
            std::string::npos);
}

}  // namespace
}  // namespace regroup
