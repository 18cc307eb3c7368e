// What conversion does to each attention: which heads form a group, and how they become one.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "parallel/process_group.h"
#include "trainer/conversion/head_merging.h"
#include "trainer/conversion/second_moments.h"
#include "trainer/formats/checkpoint_reader.h"
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
// Whether every decoder attention gets kv_groups, or each a power of two of its own, kv_groups on average.
enum class Budget { kEven, kUneven };

struct ConversionOptions {
  Pooling pooling = Pooling::kMean;
  Grouping grouping = Grouping::kPosition;
  Budget budget = Budget::kEven;
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
  // By group [m, m], m = query heads of a group x d_kv: the group's output weights [d_model, m], in the order
  // of slots, times this, in place of values' mixes. Empty: those.
  std::vector<Matrix> outputs;
  // Share of the scores' and of the outputs' squares that is lost, in the measure that was minimised (without
  // calibration: inputs all alike).
  double score_loss = 0, output_loss = 0;
  double score_error = 0;  // the scores' lost squares, mean over query heads: nats^2 where calibrated

  index_t heads_per_group() const { return parent.kv_groups / target.kv_groups; }
  index_t queries_per_head() const { return query_heads / parent.kv_groups; }
  // The parent's query head in a slot of the target, and those of a group.
  index_t query_head_in(index_t slot) const {
    const index_t queries = queries_per_head();
    return order[static_cast<std::size_t>(slot / queries)] * queries + slot % queries;
  }
  std::vector<index_t> query_heads_of(index_t group) const;
};

struct ConversionPlan {
  ConversionOptions options;
  ModelConfig target;                 // with site_kv_groups where the budget is uneven
  std::vector<SiteConversion> sites;  // those that change
};

// The moments of these attentions (positions in attention_sites()). Collective.
using MeasureMoments = std::function<std::vector<SecondMoments>(std::span<const index_t>)>;

// What the query heads of each group pass on, in the order of slots: a [m] by the parent's value heads, b [m]
// by the shared ones; moments over queries, by group [m, m].
struct OutputMoments {
  std::vector<Matrix> before, across, after;  // E[a a^T], E[a b^T], E[b b^T]
};

// The same for these planned attentions, whose shared value heads are, by group, [d_kv, d_model]. Collective.
using MeasureOutputs = std::function<std::vector<OutputMoments>(std::span<const SiteConversion>,
                                                                std::span<const std::vector<Matrix>>)>;

struct Calibration {
  MeasureMoments measure;     // empty: none
  MeasureOutputs outputs;     // empty: calibrated outputs stay as merging makes them
  index_t sites_at_once = 1;  // whose moments are held together
};

// UserError naming the field and both values unless a `parent` can become a `target`: equal but for
// every attention's number of groups, which must divide the parent's (the message lists the legal values),
// and dropout_rate.
void validate_conversion(const ModelConfig& parent, const ModelConfig& target);

// The numbers of groups that an uneven budget may choose for a site: powers of two that divide the parent's
// number, and that.
std::vector<index_t> group_choices(const AttentionSite& parent);

// Plans the conversion of a checkpoint; the ranks share the groups of all attentions and all get the whole
// plan. kCalibrated needs a calibration; of the others it only measures the losses.
//
// Similar heads are found per attention, but the self-attentions of a stack share one order of heads, because
// they share one table of position biases, whose columns follow. kRandom keeps the order, having nothing to
// compare. An uneven budget is shared out over the decoder's attentions so that the sum of score_error
// (without calibration: score_loss) and output_loss is least. Collective; UserError naming the tensor where
// weights are not finite, and as validate_conversion() and CheckpointReader::require().
ConversionPlan plan_conversion(const ProcessGroup& world, const CheckpointReader& reader,
                               const ModelConfig& parent, const ModelConfig& target,
                               const ConversionOptions& options, const Calibration& calibration = {});

}  // namespace regroup
