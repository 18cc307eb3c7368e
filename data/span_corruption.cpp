#include "data/span_corruption.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "data/tokenizer.h"
#include "kernels/base/error.h"

namespace regroup {
namespace {

// Python's and TensorFlow's round: half to even (the default rounding mode of nearbyint).
template <class Real>
std::int64_t round_half_even(Real value) {
  return static_cast<std::int64_t>(std::nearbyint(value));
}

struct HelperLengths {
  std::int64_t inputs;
  std::int64_t targets;
};

HelperLengths lengths_of(std::int64_t window, const SpanCorruption& options) {
  const std::int64_t noise = round_half_even(static_cast<double>(window) * options.noise_density);
  const std::int64_t spans = round_half_even(static_cast<double>(noise) / options.mean_span);
  return {window - noise + spans + 1, noise + spans + 1};
}

SpanLengths uncapped_lengths(const SpanCorruption& options) {
  std::int64_t window = options.inputs_length - 1;
  while (lengths_of(window + 1, options).inputs <= options.inputs_length) ++window;
  auto [inputs, targets] = lengths_of(window, options);
  // T5: makes the targets as long as the (rounder) inputs.
  if (options.noise_density == 0.5 && targets > inputs) {
    --window;
    --targets;
  }
  return {window, targets};
}

}  // namespace

SpanLengths random_spans_lengths(const SpanCorruption& options) {
  constexpr std::int64_t kShortest = 4;
  constexpr std::int64_t kLongest = std::int64_t{1} << 20;
  if (options.inputs_length < kShortest || options.inputs_length > kLongest) {
    throw UserError("an input length of {} is not in [{}, {}]", options.inputs_length, kShortest, kLongest);
  }
  if (!(options.noise_density > 0 && options.noise_density <= 0.5)) {
    throw UserError("a noise density of {} is not in (0, 0.5]", options.noise_density);
  }
  if (!(options.mean_span >= 1)) throw UserError("a mean span length of {} is below 1", options.mean_span);
  const auto fits = [&](SpanCorruption candidate) {
    return noise_counts(uncapped_lengths(candidate).window, candidate).spans <= Tokenizer::kSentinels;
  };
  if (!fits(options)) {
    SpanCorruption longest = options;
    std::int64_t good = kShortest;
    for (std::int64_t bad = options.inputs_length; bad - good > 1;) {
      longest.inputs_length = (good + bad) / 2;
      (fits(longest) ? good : bad) = longest.inputs_length;
    }
    throw UserError(
        "an input length of {} needs more than the {} sentinels there are at noise density {} and mean span "
        "{}; at "
        "most {} is possible, or a longer mean span",
        options.inputs_length, Tokenizer::kSentinels, options.noise_density, options.mean_span, good);
  }
  const SpanLengths lengths = uncapped_lengths(options);
  const auto counts = noise_counts(lengths.window, options);
  if (counts.spans > lengths.window - counts.noise) {
    throw UserError("noise density {} and mean span {} leave fewer tokens than spans", options.noise_density,
                    options.mean_span);
  }
  return lengths;
}

NoiseCounts noise_counts(std::int64_t length, const SpanCorruption& options) {
  check(length >= 2, "a window of {} tokens cannot be corrupted", length);
  const float noise = static_cast<float>(length) * static_cast<float>(options.noise_density);
  NoiseCounts counts;
  counts.noise = std::clamp<std::int64_t>(round_half_even(noise), 1, length - 1);
  const float spans = static_cast<float>(counts.noise) / static_cast<float>(options.mean_span);
  counts.spans = std::max<std::int64_t>(round_half_even(spans), 1);
  return counts;
}

std::vector<std::int64_t> random_segmentation(std::int64_t items, std::int64_t segments,
                                              const Philox& philox) {
  check(segments >= 1 && segments <= items, "{} items cannot be cut into {} segments", items, segments);
  // A composition is a set of segments - 1 of the items - 1 places between items: Floyd's algorithm draws
  // each such set with the same probability.
  std::vector<std::uint8_t> cut(static_cast<std::size_t>(items), 0);
  for (std::int64_t last = items - segments + 1; last <= items - 1; ++last) {
    const auto place = 1 + philox.below(static_cast<std::uint64_t>(last), static_cast<std::uint64_t>(last));
    auto& chosen = cut[place] ? cut[static_cast<std::size_t>(last)] : cut[place];
    chosen = 1;
  }
  std::vector<std::int64_t> lengths;
  lengths.reserve(static_cast<std::size_t>(segments));
  std::int64_t begin = 0;
  for (std::int64_t i = 1; i < items; ++i) {
    if (!cut[static_cast<std::size_t>(i)]) continue;
    lengths.push_back(i - begin);
    begin = i;
  }
  lengths.push_back(items - begin);
  return lengths;
}

std::vector<std::uint8_t> random_spans_noise_mask(std::int64_t length, const SpanCorruption& options,
                                                  const Philox& philox) {
  const auto [noise, spans] = noise_counts(length, options);
  const auto dropped = random_segmentation(noise, spans, philox.child(0));
  const auto kept = random_segmentation(length - noise, spans, philox.child(1));
  std::vector<std::uint8_t> mask;
  mask.reserve(static_cast<std::size_t>(length));
  for (std::size_t i = 0; i < dropped.size(); ++i) {
    mask.insert(mask.end(), static_cast<std::size_t>(kept[i]), 0);
    mask.insert(mask.end(), static_cast<std::size_t>(dropped[i]), 1);
  }
  return mask;
}

std::vector<std::int32_t> runs_to_sentinels(std::span<const std::int32_t> tokens,
                                            std::span<const std::uint8_t> mask, bool masked,
                                            std::int32_t first_sentinel) {
  check(tokens.size() == mask.size(), "{} tokens have a mask of {}", tokens.size(), mask.size());
  std::vector<std::int32_t> result;
  result.reserve(tokens.size());
  std::int32_t sentinel = first_sentinel;
  bool inside = false;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const bool now = (mask[i] != 0) == masked;
    if (!now) result.push_back(tokens[i]);
    if (now && !inside) result.push_back(sentinel--);
    inside = now;
  }
  return result;
}

Sample corrupt(std::span<const std::int32_t> tokens, std::span<const std::uint8_t> mask,
               std::int32_t first_sentinel, std::int64_t inputs_length, std::int64_t targets_length) {
  const auto close = [](std::vector<std::int32_t>& ids, std::int64_t length) {
    check(length >= 1, "a sequence of {} tokens has no place for eos", length);
    if (static_cast<std::int64_t>(ids.size()) > length - 1) ids.resize(static_cast<std::size_t>(length - 1));
    ids.push_back(Tokenizer::kEos);
  };
  Sample sample{runs_to_sentinels(tokens, mask, true, first_sentinel),
                runs_to_sentinels(tokens, mask, false, first_sentinel)};
  close(sample.inputs, inputs_length);
  close(sample.targets, targets_length);
  return sample;
}

std::vector<std::int32_t> reconstruct(const Sample& sample, std::int32_t first_sentinel) {
  const auto is_sentinel = [&](std::int32_t id) {
    return id <= first_sentinel && id > first_sentinel - Tokenizer::kSentinels;
  };
  std::unordered_map<std::int32_t, std::vector<std::int32_t>> spans;
  std::int32_t current = -1;
  for (const auto id : sample.targets) {
    if (is_sentinel(id)) {
      current = id;
    } else if (id != Tokenizer::kEos && id != Tokenizer::kPad) {
      spans[current].push_back(id);
    }
  }
  std::vector<std::int32_t> tokens;
  for (const auto id : sample.inputs) {
    if (is_sentinel(id)) {
      const auto& span = spans[id];
      tokens.insert(tokens.end(), span.begin(), span.end());
    } else if (id != Tokenizer::kEos && id != Tokenizer::kPad) {
      tokens.push_back(id);
    }
  }
  return tokens;
}

}  // namespace regroup
