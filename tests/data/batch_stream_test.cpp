#include "data/batch_stream.h"

#include <set>

#include <gtest/gtest.h>

#include "tests/data/corpus_fixture.h"

namespace regroup {
namespace {

using test::error_of;
using test::TemporaryFolder;

// A corpus of 60 train windows of 141 tokens (128 inputs, 29 targets), and a tail, in three shards.
class BatchStreams : public ::testing::Test {
 protected:
  void SetUp() override {
    test::write_corpus(
        folder_ / "c",
        {test::random_tokens(5000, 1), test::random_tokens(400, 2), test::random_tokens(3100, 3)},
        {test::random_tokens(141 * 5 + 100, 4)});
    corpus_.emplace(folder_ / "c");
  }
  Samples samples(bool shuffle = true, std::uint64_t seed = 11) const {
    return {
        *corpus_, Split::kTrain, {.corruption = {.inputs_length = 128}, .seed = seed, .shuffle = shuffle}};
  }

  const TemporaryFolder folder_;
  std::optional<Corpus> corpus_;
};

TEST_F(BatchStreams, SamplesAreTheCorpusCorrupted) {
  const auto all = samples();
  EXPECT_EQ(all.windows(), 60);
  EXPECT_EQ(all.lengths().targets, 29);
  std::set<std::vector<std::int32_t>> windows;
  for (std::int64_t n = 0; n < 60; ++n) {
    EXPECT_EQ(reconstruct(all(n), corpus_->manifest().first_sentinel()), all.window(n));
    windows.insert(all.window(n));
  }
  EXPECT_EQ(windows.size(), 60U);
  // The second epoch has the same windows in another order under other masks.
  const SampleOrder order(11, 60);
  for (std::int64_t n = 0; n < 60; ++n) {
    for (std::int64_t m = 60; m < 120; ++m) {
      if (order(n) == order(m)) {
        EXPECT_EQ(all.window(n), all.window(m));
        EXPECT_NE(all(n).inputs, all(m).inputs);
      }
    }
  }
  EXPECT_NE(samples(true, 12)(0).inputs, all(0).inputs);
}

TEST_F(BatchStreams, EvaluationTakesWindowsInTheirOrder) {
  const Samples heldout(*corpus_, Split::kHeldout, {.corruption = {.inputs_length = 128}, .shuffle = false});
  EXPECT_EQ(heldout.windows(), 5);
  std::vector<std::int32_t> expected(141);
  for (std::int64_t n = 0; n < 5; ++n) {
    corpus_->read(Split::kHeldout, n * 141, expected);
    EXPECT_EQ(heldout.window(n), expected);
  }
}

TEST_F(BatchStreams, BatchesArePaddedSamples) {
  const auto all = samples();
  Batch batch;
  make_batch(all, {.first_sample = 58, .count = 4}, batch);  // over the end of the epoch
  EXPECT_EQ(batch.input_ids.size(), 4U * 128U);
  EXPECT_EQ(batch.targets.size(), 4U * 29U);
  for (std::int64_t i = 0; i < 4; ++i) {
    const Sample sample = all(58 + i);
    const auto row = [&](const std::vector<std::int32_t>& ids, std::int64_t length, std::size_t filled) {
      const auto begin = ids.begin() + i * length;
      EXPECT_TRUE(std::all_of(begin + static_cast<std::ptrdiff_t>(filled), begin + length,
                              [](auto id) { return id == 0; }));
      return std::vector(begin, begin + static_cast<std::ptrdiff_t>(filled));
    };
    EXPECT_EQ(row(batch.input_ids, 128, sample.inputs.size()), sample.inputs);
    EXPECT_EQ(row(batch.targets, 29, sample.targets.size()), sample.targets);
  }
}

TEST_F(BatchStreams, PrefetchedBatchesEqualThePureFunction) {
  const auto all = samples();
  // As the second of two data-parallel ranks: samples 3..5, 9..11, ...
  const auto schedule = [](std::int64_t b) -> std::optional<BatchRequest> {
    if (b == 37) return std::nullopt;
    return BatchRequest{b * 6 + 3, 3};
  };
  for (const PrefetchOptions options : {PrefetchOptions{1, 2}, {1, 4}, {2, 3}, {4, 2}, {4, 9}}) {
    BatchStream stream(all, schedule, options);
    Batch expected;
    for (std::int64_t b = 0; b < 37; ++b) {
      const Batch* batch = stream.next();
      ASSERT_NE(batch, nullptr);
      make_batch(all, {b * 6 + 3, 3}, expected);
      ASSERT_EQ(batch->first_sample, expected.first_sample);
      ASSERT_EQ(batch->input_ids, expected.input_ids);
      ASSERT_EQ(batch->targets, expected.targets);
    }
    EXPECT_EQ(stream.next(), nullptr);
    EXPECT_EQ(stream.next(), nullptr);
    EXPECT_GE(stream.wait_seconds(), 0);
  }
}

TEST_F(BatchStreams, CarriesExceptionsToTheConsumer) {
  BatchStream stream(samples(),
                     [](std::int64_t b) -> std::optional<BatchRequest> {
                       if (b == 3) throw UserError("no third batch");
                       return BatchRequest{b, 1};
                     },
                     {.workers = 3, .depth = 5});
  for (int b = 0; b < 3; ++b) EXPECT_NE(stream.next(), nullptr);
  EXPECT_NE(error_of([&] { stream.next(); }).find("no third batch"), std::string::npos);
  EXPECT_NE(error_of([&] { stream.next(); }).find("no third batch"), std::string::npos);
}

TEST_F(BatchStreams, CarriesWhatADamagedShardSays) {
  auto tokens = test::random_tokens(141 * 10, 5);
  tokens[141 * 4 + 3] = 1050;
  test::write_corpus(folder_ / "damaged", {tokens}, {});
  const Corpus damaged(folder_ / "damaged");
  const Samples all(damaged, Split::kTrain, {.corruption = {.inputs_length = 128}, .shuffle = false});
  BatchStream stream(all, [](std::int64_t b) { return BatchRequest{b, 1}; });
  for (int b = 0; b < 4; ++b) EXPECT_NE(stream.next(), nullptr);
  EXPECT_NE(error_of([&] { stream.next(); }).find("tokens-00000.bin holds the token 1050"),
            std::string::npos);
}

TEST_F(BatchStreams, EndsWithBatchesUnused) {
  for (int i = 0; i < 20; ++i) {
    BatchStream stream(samples(),
                       [](std::int64_t b) {
                         return BatchRequest{b * 4, 4};
                       },
                       {.workers = 2, .depth = 3});
    for (int b = 0; b < i % 4; ++b) EXPECT_NE(stream.next(), nullptr);
  }
}

TEST_F(BatchStreams, NeedsAWindow) {
  test::write_corpus(folder_ / "short", {test::random_tokens(140, 5)}, {});
  const Corpus corpus(folder_ / "short");
  const SampleOptions options{.corruption = {.inputs_length = 128}};
  EXPECT_NE(error_of([&] {
              Samples(corpus, Split::kTrain, options);
            }).find("has 140 tokens, fewer than one window of 141"),
            std::string::npos);
  EXPECT_NE(error_of([&] { Samples(corpus, Split::kHeldout, options); }).find("heldout split"),
            std::string::npos);
}

TEST(RealText, C4ComesBackWholeUnderT5sVocabulary) {
  REGROUP_NEEDS_SHARED("c4-train.sample.json.gz");
  REGROUP_NEEDS_SHARED("t5_spiece.model");
  const TemporaryFolder folder;
  prepare_corpus({.inputs = {test::shared("c4-train.sample.json.gz")},
                  .tokenizer = test::shared("t5_spiece.model"),
                  .output = folder / "c4",
                  .heldout_fraction = 0.05});
  const Corpus corpus(folder / "c4");
  corpus.verify();
  const Tokenizer tokenizer(corpus.tokenizer_file());
  EXPECT_EQ(corpus.vocab_size(), 32128);
  EXPECT_EQ(corpus.manifest().first_sentinel(), tokenizer.sentinel(0));
  for (const Split split : kSplits) {
    const Samples samples(corpus, split, {.seed = 3});
    EXPECT_EQ(samples.lengths().window, 568);
    for (std::int64_t n = 0; n < samples.windows(); ++n) {
      const auto sample = samples(n);
      ASSERT_EQ(sample.inputs.size(), 512U);
      ASSERT_EQ(sample.targets.size(), 114U);
      const auto text = reconstruct(sample, tokenizer.sentinel(0));
      ASSERT_EQ(text, samples.window(n));
      ASSERT_EQ(tokenizer.decode(text), tokenizer.decode(samples.window(n)));
    }
  }
}

}  // namespace
}  // namespace regroup
