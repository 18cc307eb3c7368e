// The second moments of attentions' inputs, summed while the model runs.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/process_group.h"
#include "trainer/conversion/second_moments.h"
#include "trainer/run/model_runner.h"

namespace regroup {

// Sums SecondMoments of some sites over all the batches that a runner observes. All memory is taken at
// construction: on the device 4 x 8 x d_model^2 bytes a site (the first three moments split over tp) and the
// work memory of one attention, in no arena of the runner's.
//
// A product is summed in the type of statistics over one micro-batch, and over micro-batches in float64. Of
// the moments of x and y, which every tensor-parallel rank has whole, a rank sums its block of rows; of
// those of z, the whole of its own heads' part. So one sum over all ranks completes every moment.
class MomentProbe final : public AttentionProbe {
 public:
  // `sites`: places in attention_sites(), each once. UserError where d_kv > d_model or there
  // is not enough memory. `runner` and `mesh` outlive the probe.
  MomentProbe(ModelRunner& runner, const Mesh& mesh, const std::vector<index_t>& sites);

  // The batch that the runner is to observe next: which of its tokens are padding.
  void begin(const Batch& batch);
  void observe(Step& step, const View& view) override;
  // Over the batches of all ranks, by the place of a site in `sites`. Collective over `world`, the ranks of
  // the mesh.
  std::vector<SecondMoments> take(const ProcessGroup& world);

 private:
  // The tokens of one side of a batch.
  struct Tokens {
    Buffer rows_memory, padding_memory;
    Tensor rows;      // int32 [tokens]: its row for a real one, -1 for padding
    Tensor padding;   // int32 [tokens]: 0 for a real one, 1 for padding
    double seen = 0;  // real tokens of all batches
  };
  // The sums over one site, float64 [rows, D].
  struct Sums {
    Tensor query, key, attending, attended;
  };

  static Tokens tokens_of(Backend& backend, index_t most);
  void mark(Tokens& tokens, const std::vector<std::int32_t>& ids);
  Tensor real_rows(Tensor x, const Tokens& tokens);
  Tensor my_columns(Tensor x) const { return x.slice(1, first_row_, last_row_); }
  void add(Tensor a, Tensor b, Tensor sum);
  void add_attending(const View& view, const Tokens& queries, Tensor sum);
  void add_attended(const View& view, const Tokens& queries, Tensor sum);
  std::vector<double> summed(const ProcessGroup& world, Tensor sum, double count) const;

  ModelRunner& runner_;
  Backend& backend_;
  const Mesh& mesh_;
  const std::vector<AttentionSite> all_sites_;
  const std::vector<index_t> sites_;
  const DType compute_, statistic_;
  const index_t width_, heads_, model_heads_, d_kv_;
  const index_t first_row_, last_row_;  // this rank's block

  Tokens inputs_, targets_;
  Buffer sums_memory_;
  std::vector<Sums> sums_;
  Buffer product_, wide_product_;           // S and float64 [D, D]
  Buffer rows_, context_;                   // T [tokens, D]
  Buffer out_, dout_, dq_, dk_, dv_;        // T [tokens, heads x C]
  Buffer log_sum_exp_, weights_, discard_;  // S
  Buffer ones_, zeros_;                     // T [max(D, H C)], [tokens, D]
  std::vector<std::int32_t> host_rows_, host_padding_;
};

}  // namespace regroup
