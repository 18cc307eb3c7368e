// Merges the groups of attentions, the ranks sharing the work.
#pragma once

#include <span>

#include "trainer/conversion/conversion_plan.h"

namespace regroup {

// All members are collective over `world`; every rank gets everything. `moments`: one a site, or none.
class GroupPlanner {
 public:
  // They outlive the planner.
  GroupPlanner(const ProcessGroup& world, const CheckpointReader& reader, const ModelConfig& parent,
               const ConversionOptions& options)
      : world_(world), reader_(reader), parent_(parent), options_(options) {}

  // Fills keys, values and losses of each site, whose order and groups are set. UserError as read_head().
  void plan(std::span<SiteConversion> sites, std::span<const SecondMoments> moments) const;

  // The shared value heads of planned sites, by group [d_kv, d_model].
  std::vector<std::vector<Matrix>> shared_values(std::span<const SiteConversion> sites) const;
  // The outputs that make E|| W_o a - W_o outputs b ||^2 least for each group as a whole, errors of its heads
  // together (merge_heads() adds them up as if they could not cancel): (E[a b^T] + r M) (E[b b^T] + r I)^-1,
  // drawn by a little r to M, the mixes of values. Sets output_loss to the share of the squares that is lost
  // then. A site whose groups are single heads stays.
  void fit_outputs(std::span<SiteConversion> sites, std::span<const OutputMoments> moments) const;

  // What a site loses where two of its key/value heads become one: score_loss + output_loss of the pair, as
  // shares of the whole site's. Symmetric [heads, heads].
  Matrix pair_losses(const SiteConversion& site, const SecondMoments* moments) const;

 private:
  void fit_some(std::span<SiteConversion> sites, std::span<const OutputMoments> moments) const;
  Matrix group_outputs(const SiteConversion& site, index_t group) const;
  void collect(std::span<SiteConversion> sites, const std::vector<std::string>& bytes) const;

  const ProcessGroup& world_;
  const CheckpointReader& reader_;
  const ModelConfig& parent_;
  ConversionOptions options_;
};

// Whether shared heads are made by merge_heads(), and the other sides of the products change with them.
bool merges_products(Pooling pooling);

}  // namespace regroup
