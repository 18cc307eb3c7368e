#include "data/span_corruption.h"

#include <map>
#include <numeric>

#include <gtest/gtest.h>

#include "tests/data/fixture.h"

namespace regroup {
namespace {

using test::error_of;
using Ids = std::vector<std::int32_t>;
using Mask = std::vector<std::uint8_t>;

Philox philox_of(std::uint64_t number) { return Philox(7, RandomPurpose::kTest, number); }

TEST(SpanCorruption, LengthsAreT5s) {
  struct Case {
    SpanCorruption options;
    std::int64_t window;
    std::int64_t targets;
  };
  // The last two, and no others, are by T5's Python formula run apart; the rest are T5's own values.
  const std::vector<Case> cases = {
      {{.inputs_length = 512}, 568, 114},
      {{.inputs_length = 8}, 8, 2},
      {{.inputs_length = 16}, 17, 5},
      {{.inputs_length = 32}, 34, 8},
      {{.inputs_length = 64}, 70, 14},
      {{.inputs_length = 128}, 141, 29},
      {{.inputs_length = 256}, 284, 58},
      {{.inputs_length = 1024}, 1137, 229},
      {{64, 0.20, 2.0}, 70, 22},
      {{64, 0.20, 1.0}, 63, 27},
      {{.inputs_length = 2048, .mean_span = 6.0}, 2340, 410},
      {{100, 0.30, 5.0}, 130, 48},
  };
  for (const auto& c : cases) {
    const auto lengths = random_spans_lengths(c.options);
    EXPECT_EQ(lengths.window, c.window) << c.options.inputs_length;
    EXPECT_EQ(lengths.targets, c.targets) << c.options.inputs_length;
  }
}

TEST(SpanCorruption, RefusesMoreSpansThanSentinels) {
  const auto message = error_of([] { random_spans_lengths({.inputs_length = 2048}); });
  EXPECT_NE(message.find("more than the 100 sentinels"), std::string::npos) << message;
  const auto at = message.find("at most ");
  ASSERT_NE(at, std::string::npos) << message;
  const std::int64_t longest = std::stoll(message.substr(at + 8));
  EXPECT_NO_THROW(random_spans_lengths({.inputs_length = longest}));
  EXPECT_THROW(random_spans_lengths({.inputs_length = longest + 1}), UserError);
  for (const SpanCorruption& bad : {SpanCorruption{.inputs_length = 1},
                                    {.inputs_length = -5},
                                    {.noise_density = 0},
                                    {.noise_density = 0.9},
                                    {.noise_density = std::nan("")},
                                    {.mean_span = 0.5},
                                    {.mean_span = std::nan("")}}) {
    EXPECT_THROW(random_spans_lengths(bad), UserError);
  }
}

TEST(SpanCorruption, CountsAreT5s) {
  const auto counts = noise_counts(568, {});
  EXPECT_EQ(counts.noise, 85);
  EXPECT_EQ(counts.spans, 28);
  // 190 * float32(0.15) rounds up to 28.5 and that to 28, as even, or 29? TensorFlow's float32 product says
  // 29, Python's float64 helper 28.
  EXPECT_EQ(noise_counts(2, {}).noise, 1);
  EXPECT_EQ(noise_counts(10, {}).noise, 2);                                         // 1.5 to even
  EXPECT_EQ(noise_counts(30, {}).noise, 4);                                         // 4.5 to even
  EXPECT_EQ(noise_counts(100, {.noise_density = 0.25, .mean_span = 10}).spans, 2);  // 2.5 to even
}

TEST(SpanCorruption, SentinelsAreT5s) {
  const Ids tokens = {10, 11, 12, 13, 14, 15};
  const Mask mask = {1, 1, 0, 0, 1, 0};
  EXPECT_EQ(runs_to_sentinels(tokens, mask, true, 999), (Ids{999, 12, 13, 998, 15}));
  EXPECT_EQ(runs_to_sentinels(tokens, mask, false, 999), (Ids{10, 11, 999, 14, 998}));
}

TEST(SpanCorruption, DenoisesAsT5) {
  const Ids text = {3, 2, 20, 4, 3, 2, 8, 13, 2, 3, 2, 23, 7, 19, 22, 3, 2, 7, 2};
  const Mask mask = {0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1};
  const auto sample = corrupt(text, mask, 25, 100, 100);
  EXPECT_EQ(sample.inputs, (Ids{3, 2, 20, 4, 3, 2, 8, 13, 25, 3, 2, 23, 7, 19, 24, 1}));
  EXPECT_EQ(sample.targets, (Ids{25, 2, 24, 22, 3, 2, 7, 2, 1}));
  const auto cut = corrupt(text, mask, 25, 10, 4);  // trimmed to one less, then eos
  EXPECT_EQ(cut.inputs, (Ids{3, 2, 20, 4, 3, 2, 8, 13, 25, 1}));
  EXPECT_EQ(cut.targets, (Ids{25, 2, 24, 1}));
}

TEST(SpanCorruption, MasksHaveTheirExactShape) {
  for (const std::int64_t length : {2, 3, 7, 20, 141, 568, 1137}) {
    for (std::uint64_t n = 0; n < 300; ++n) {
      const auto mask = random_spans_noise_mask(length, {}, philox_of(n));
      const auto counts = noise_counts(length, {});
      ASSERT_EQ(static_cast<std::int64_t>(mask.size()), length);
      ASSERT_EQ(std::accumulate(mask.begin(), mask.end(), std::int64_t{0}), counts.noise);
      ASSERT_EQ(mask.front(), 0);
      ASSERT_EQ(mask.back(), 1);
      std::int64_t spans = 0;
      for (std::size_t i = 1; i < mask.size(); ++i) spans += mask[i] && !mask[i - 1];
      ASSERT_EQ(spans, counts.spans);
    }
  }
  EXPECT_EQ(random_spans_noise_mask(568, {}, philox_of(3)), random_spans_noise_mask(568, {}, philox_of(3)));
  EXPECT_NE(random_spans_noise_mask(568, {}, philox_of(3)), random_spans_noise_mask(568, {}, philox_of(4)));
}

TEST(SpanCorruption, CompositionsAreUniform) {
  // 7 items into 3 parts: 15 compositions, each with probability 1/15.
  constexpr int kDraws = 30000;
  std::map<std::vector<std::int64_t>, int> seen;
  for (std::uint64_t n = 0; n < kDraws; ++n) {
    const auto parts = random_segmentation(7, 3, philox_of(n));
    ASSERT_EQ(parts.size(), 3U);
    ASSERT_EQ(std::accumulate(parts.begin(), parts.end(), std::int64_t{0}), 7);
    ASSERT_GE(*std::min_element(parts.begin(), parts.end()), 1);
    ++seen[parts];
  }
  ASSERT_EQ(seen.size(), 15U);
  double chi_square = 0;
  for (const auto& [parts, count] : seen) {
    const double expected = kDraws / 15.0;
    chi_square += (count - expected) * (count - expected) / expected;
  }
  EXPECT_LT(chi_square, 36.12);  // the 0.999 quantile at 14 degrees of freedom
  EXPECT_EQ(random_segmentation(5, 5, philox_of(0)), (std::vector<std::int64_t>{1, 1, 1, 1, 1}));
  EXPECT_EQ(random_segmentation(5, 1, philox_of(0)), std::vector<std::int64_t>{5});
  EXPECT_THROW(random_segmentation(5, 6, philox_of(0)), InternalError);
}

TEST(SpanCorruption, EveryPositionIsAsNoisyAsT5s) {
  // Away from its ends a window is noise with the probability noise / length, here 85 / 568; the mean over
  // the middle of 4000 masks has a standard error below 0.001.
  constexpr std::uint64_t kMasks = 4000;
  double noisy = 0;
  for (std::uint64_t n = 0; n < kMasks; ++n) {
    const auto mask = random_spans_noise_mask(568, {}, philox_of(n));
    noisy += std::accumulate(mask.begin() + 184, mask.begin() + 384, 0.0) / 200;
  }
  EXPECT_NEAR(noisy / kMasks, 85.0 / 568.0, 0.004);
}

TEST(SpanCorruption, LosesNoToken) {
  for (const std::int64_t inputs : {16, 32, 64, 128, 256, 512, 777, 1024}) {
    const SpanCorruption options{.inputs_length = inputs};
    const auto lengths = random_spans_lengths(options);
    for (std::uint64_t n = 0; n < 500; ++n) {
      Ids tokens(static_cast<std::size_t>(lengths.window));
      const auto philox = philox_of(n).child(static_cast<std::uint64_t>(inputs));
      for (std::size_t i = 0; i < tokens.size(); ++i)
        tokens[i] = 2 + static_cast<std::int32_t>(philox.below(31998, i));
      const auto mask = random_spans_noise_mask(lengths.window, options, philox);
      const auto sample = corrupt(tokens, mask, 32099, inputs, lengths.targets);
      ASSERT_LE(static_cast<std::int64_t>(sample.inputs.size()), inputs);
      ASSERT_EQ(static_cast<std::int64_t>(sample.targets.size()), lengths.targets);
      ASSERT_EQ(sample.inputs.back(), 1);
      ASSERT_EQ(sample.targets.back(), 1);
      ASSERT_EQ(sample.targets.front(), 32099);
      ASSERT_EQ(reconstruct(sample, 32099), tokens) << inputs << ", sample " << n;
    }
  }
}

}  // namespace
}  // namespace regroup
