// Multi-head to grouped-query conversion while loading: the key and value heads of a group become one.
// Ainslie et al. 2023, section 2.1, by mean, by taking the first, or by drawing a fresh one; or by the best
// shared head (conversion_plan.h).
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "parallel/partition.h"
#include "trainer/conversion/conversion_plan.h"
#include "trainer/formats/checkpoint_reader.h"
#include "trainer/model/config.h"

namespace regroup {

// source [groups * heads_per_group * d_kv, d_model] -> out [groups * d_kv, d_model], both dense float32.
// kMean: out[g, i, :] = 1/K sum_k source[g K + k, i, :], summed in float64; kFirst: source[g K, i, :].
// InternalError for kRandom (draw_heads()) and for shapes that do not fit.
void pool_heads(const Tensor& source, const Tensor& out, index_t heads_per_group, index_t d_kv,
                Pooling pooling);

// out = the rows [row_begin, ...) of a fresh parameter `name`: normal with standard deviation `scale`,
// element e of the global tensor being a function of (seed, name, e) only. Independent of the draws that
// initialise a model of the same seed.
void draw_heads(const Tensor& out, const std::string& name, index_t row_begin, double scale,
                std::uint64_t seed);

// Reads a checkpoint of a `parent` as one of a `target`, tensor by tensor. Where an attention has fewer
// groups in the target, its heads are put in order and merged as the plan says; everything else is read as it
// is, so with equal numbers of groups this is plain reading. Not collective.
class ConvertingReader {
 public:
  // UserError as validate_conversion() and CheckpointReader::require(). `reader` and `plan` outlive it.
  // InternalError where the plan lacks an attention that changes.
  ConvertingReader(const CheckpointReader& reader, const ModelConfig& parent, const ModelConfig& target,
                   const ConversionPlan& plan);

  // Fills `to`, a dense float32 host slice of a parameter of the target, by any partition of whole heads; of
  // the parent's heads it reads those that the slice is made of and no others.
  void read(const ShardedTensor& to) const;

  // The parameters that a conversion by this plan does not read as they are.
  static std::set<std::string> changed_parameters(const ConversionPlan& plan);

 private:
  // What happens to one parameter.
  struct Change {
    enum class Role { kQuery, kKey, kValue, kOutput, kBias };
    Role role = Role::kQuery;
    const SiteConversion* site = nullptr;  // in plan_
    double scale = 0;                      // standard deviation of fresh heads
  };
  static std::map<std::string, Change> changes_of(const ConversionPlan& plan);
  void read_queries(const ShardedTensor& to, const SiteConversion& site) const;
  void read_outputs(const ShardedTensor& to, const SiteConversion& site) const;
  void read_shared(const ShardedTensor& to, const Change& change) const;
  void read_bias(const ShardedTensor& to, const Change& change) const;

  const CheckpointReader& reader_;
  index_t d_kv_, d_model_;
  const ConversionPlan& plan_;
  std::map<std::string, Change> changes_;  // by parameter
};

}  // namespace regroup
