// What conversion does to each attention: which heads form a group, and how they become one.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "parallel/process_group.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/conversion/head_merging.h"
#include "trainer/conversion/second_moments.h"
#include "trainer/model/parameters.h"

namespace regroup {

// kMean, kFirst, kRandom: Ainslie et al. 2023, section 2.1. kSpectral: the best shared head where every input
// is as likely as any other; kCalibrated: for the inputs that calibration has seen.
enum class Pooling { kMean, kFirst, kRandom, kSpectral, kCalibrated };
Pooling pooling_from_string(const std::string& name);  // "mean" ...; UserError naming the nearest
std::string to_string(Pooling pooling);
std::vector<std::string> pooling_names();

// Which heads form a group: neighbours, or those that lose least by becoming one.
enum class Grouping { kPosition, kSimilarity };

struct ConversionOptions {
  Pooling pooling = Pooling::kMean;
  Grouping grouping = Grouping::kPosition;
  std::uint64_t seed = 0;  // of kRandom
};

// One attention with fewer groups in the target than in the parent.
struct SiteConversion {
  AttentionSite parent, target;
  index_t query_heads = 0;
  // Slot -> the parent's key/value head in it. Group g of the target holds the slots [g n, (g + 1) n), and
  // query heads follow theirs.
  std::vector<index_t> order;
  // By group; empty for kMean, kFirst and kRandom, whose left factors stay.
  std::vector<SharedHead> keys, values;
  // Share of the scores' and of the outputs' squares that is lost, in the measure that was minimised (without
  // calibration: inputs all alike).
  double score_loss = 0, output_loss = 0;

  index_t heads_per_group() const { return parent.kv_groups / target.kv_groups; }
  index_t queries_per_head() const { return query_heads / parent.kv_groups; }
};

// By AttentionSite::prefix, only attentions that change; with how the shared heads are made.
struct ConversionPlan {
  ConversionOptions options;
  std::vector<SiteConversion> sites;
};

// The moments of these attentions (positions in attention_sites()). Collective.
using MeasureMoments = std::function<std::vector<SecondMoments>(std::span<const index_t>)>;

struct Calibration {
  MeasureMoments measure;     // empty: none
  index_t sites_at_once = 1;  // whose moments are held together
};

// UserError naming the field and both values unless a `parent` can become a `target`: equal but for
// every attention's number of groups, which must divide the parent's (the message lists the legal values),
// and dropout_rate.
void validate_conversion(const ModelConfig& parent, const ModelConfig& target);

// Plans the conversion of a checkpoint; the ranks share the groups of all attentions and all get the whole
// plan. kCalibrated needs a calibration; with one, the losses of the others are measured by it too.
// Collective; UserError naming the tensor where weights are not finite, and as validate_conversion().
ConversionPlan plan_conversion(const ProcessGroup& world, const CheckpointReader& reader,
                               const ModelConfig& parent, const ModelConfig& target,
                               const ConversionOptions& options, const Calibration& calibration = {});

}  // namespace regroup
