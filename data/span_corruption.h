// T5's objective: drop random spans of a window of text; the model reads what is left and writes what is
// gone. Source: t5/data/preprocessors.py (span_corruption, denoise), its rounding included.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/random.h"

namespace regroup {

struct SpanCorruption {
  std::int64_t inputs_length = 512;  // tokens the encoder sees, sentinels and eos included
  double noise_density = 0.15;       // share of a window's tokens that is dropped
  double mean_span = 3.0;            // mean length of a dropped span
};

// Of random_spans_lengths().
struct SpanLengths {
  std::int64_t window = 0;   // raw tokens of a sample: 568 for 512 inputs
  std::int64_t targets = 0;  // tokens the decoder writes, sentinels and eos included: 114
};

// T5's random_spans_helper: the largest window t with inputs(t) <= inputs_length, growing from inputs_length
// - 1, where noise = round(t * density), spans = round(noise / mean_span), inputs = t - noise + spans + 1 and
// targets = noise + spans + 1; Python's round (half to even), float64. Throws UserError for parameters out of
// range, or where the window would need more than Tokenizer::kSentinels spans (naming the largest length that
// does not).
SpanLengths random_spans_lengths(const SpanCorruption& options);

// Of a mask over `length` tokens, T5's random_spans_noise_mask: noise = round(length * density) clipped to
// [1, length - 1], spans = max(1, round(noise / mean_span)); half to even, float32.
struct NoiseCounts {
  std::int64_t noise = 0;
  std::int64_t spans = 0;
};
NoiseCounts noise_counts(std::int64_t length, const SpanCorruption& options);

// `segments` positive lengths that sum to `items`, uniform over all such compositions: a function of
// `philox`. 1 <= segments <= items.
std::vector<std::int64_t> random_segmentation(std::int64_t items, std::int64_t segments,
                                              const Philox& philox);

// Which of `length` >= 2 tokens are dropped (1): spans of kept and of dropped tokens in turn, the first kept,
// the last dropped, both random_segmentation()s of noise_counts(); a function of `philox`.
std::vector<std::uint8_t> random_spans_noise_mask(std::int64_t length, const SpanCorruption& options,
                                                  const Philox& philox);

// `tokens` with the k-th run of masked tokens (mask == masked) replaced by the one id first_sentinel - k.
std::vector<std::int32_t> runs_to_sentinels(std::span<const std::int32_t> tokens,
                                            std::span<const std::uint8_t> mask, bool masked,
                                            std::int32_t first_sentinel);

// One training sample, without padding.
struct Sample {
  std::vector<std::int32_t> inputs;  // kept tokens, dropped runs as sentinels; cut to inputs_length - 1; eos
  std::vector<std::int32_t>
      targets;  // dropped tokens, kept runs as sentinels; cut to targets_length - 1; eos
};
// `first_sentinel` is the id of <extra_id_0>; the k-th run gets first_sentinel - k.
Sample corrupt(std::span<const std::int32_t> tokens, std::span<const std::uint8_t> mask,
               std::int32_t first_sentinel, std::int64_t inputs_length, std::int64_t targets_length);

// The text a sample was made from: its inputs with each sentinel in [first_sentinel - 99, first_sentinel]
// replaced by what follows the same sentinel in its targets. The inverse of corrupt() where that cut nothing
// off.
std::vector<std::int32_t> reconstruct(const Sample& sample, std::int32_t first_sentinel);

}  // namespace regroup
