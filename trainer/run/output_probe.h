// The second moments of what attentions pass on before and after a conversion, summed while the parent runs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "parallel/process_group.h"
#include "trainer/conversion/conversion_plan.h"
#include "trainer/run/model_runner.h"

namespace regroup {

// Sums OutputMoments of some planned attentions over all the batches that a runner observes: each attention
// runs twice more with the parent's probabilities, over the parent's values (a) and over the shared ones (b).
// All memory is taken at construction: on the device 3 x 8 x m^2 bytes a group and the work memory of one
// attention.
//
// The heads of all tensor-parallel ranks are brought together, and each group is summed by one tp rank: in
// the type of statistics over one micro-batch, over micro-batches in float64.
class OutputProbe final : public AttentionProbe {
 public:
  // `shared`: of each site the shared value heads, by group [d_kv, d_model]. UserError where there is not
  // enough memory. `runner` and `mesh` outlive the probe.
  OutputProbe(ModelRunner& runner, const Mesh& mesh, std::span<const SiteConversion> sites,
              std::span<const std::vector<Matrix>> shared);

  // The batch that the runner is to observe next: which of its tokens are padding.
  void begin(const Batch& batch);
  void observe(Step& step, const View& view) override;
  // Over the batches of all ranks, by site. Collective over `world`, the ranks of the mesh.
  std::vector<OutputMoments> take(const ProcessGroup& world);

 private:
  struct Site {
    index_t place = 0;  // in attention_sites()
    AttentionKind kind = AttentionKind::kCross;
    index_t groups = 0, width = 0;  // of the target; columns of a group
    index_t first_group = 0;        // of this tp rank, and every tp-th from there
    std::vector<index_t> slots;     // of this rank's query heads, in their order
    Tensor parent_values;           // T [parent's key/value heads of this rank x C, D]
    Buffer shared_values;           // T, the same shape: of each the shared head of its group
    Buffer sums;                    // float64 [groups of this tp rank, 3, width, width]
  };
  // The rows of one side of a batch that are not padding: their numbers, -1 for padding.
  struct Rows {
    Buffer memory;
    Tensor rows;
    double seen = 0;
  };

  void add_site(const SiteConversion& conversion, std::span<const Matrix> shared);
  void mark(Rows& rows, const std::vector<std::int32_t>& ids);
  Tensor passed_on(const View& view, const Site& site, Tensor values, const Rows& queries, Buffer& wide);
  void add(Tensor a, Tensor b, Tensor sum);

  ModelRunner& runner_;
  Backend& backend_;
  const Mesh& mesh_;
  const DType compute_, statistic_;
  const index_t heads_, model_heads_, d_kv_, width_;
  Rows inputs_, targets_;
  std::vector<Site> sites_;
  Buffer values_, out_, log_sum_exp_;  // of one attention
  Buffer gathered_, before_, after_;   // T [tokens, model heads x C]
  Buffer product_, wide_product_;      // S and float64 [m, m]
  std::vector<std::int32_t> host_rows_;
};

}  // namespace regroup
