// The factors of one attention's heads, from a checkpoint and the moments of its inputs.
#pragma once

#include <span>
#include <string>

#include "trainer/conversion/head_merging.h"
#include "trainer/conversion/second_moments.h"
#include "trainer/formats/checkpoint_reader.h"
#include "trainer/model/parameters.h"

namespace regroup {

// Rows of a weight that hold head `head`: [d_kv, d_model], in float64. UserError naming the tensor where it
// is not finite.
Matrix read_head(const CheckpointReader& reader, const std::string& name, index_t head, index_t d_kv,
                 index_t d_model);
// Columns of several heads, each [d_model, d_kv]. Reads from the first head to the last one at once.
std::vector<Matrix> read_output_heads(const CheckpointReader& reader, const std::string& name,
                                      std::span<const index_t> heads, index_t d_kv, index_t d_model);

// Key/value heads and what is on the other side of them.
struct HeadFactors {
  HeadProducts products;
  Matrix weights;  // W_k or W_v of the heads, one below the other
};

// Reads heads as they are asked for; holds up to three factors of [d_model, d_model] beside them.
//
// The measure, from moments (E: docs/conversion.md): queries E[x x^T]; keys E[sum_j p_ij y_j y_j^T] - E[z
// z^T], the covariance of keys under the attention's own probabilities, because a softmax does not see what
// all its keys have in common; values E[sum_j p_ij y_j y_j^T], what is looked at (E[z z^T], what is passed on
// in the mean, measured a little worse on trained models). Each is shrunk by 1e-3 towards its mean diagonal,
// or by 1e-2, 1e-1 or 1 where it is indefinite without; moments of nothing are the identity.
class SiteFactors {
 public:
  // `site`: of the parent. `moments`: of the site, or null: every input is as likely as any other.
  SiteFactors(const CheckpointReader& reader, const ModelConfig& parent, const AttentionSite& site,
              const SecondMoments* moments);

  // Of these key/value heads of the parent.
  HeadFactors scores(std::span<const index_t> heads) const;   // W_q^T W_k
  HeadFactors outputs(std::span<const index_t> heads) const;  // W_o W_v

 private:
  const CheckpointReader& reader_;
  index_t d_model_, d_kv_, queries_per_head_;
  std::string prefix_;
  Matrix queries_, keys_, values_;  // L of each; empty: the identity
};

// Multiplies combine and mixes by a diagonal matrix and its inverse; the products stay. Each direction
// becomes as large on one side as on the other (sqrt of the squares of mix_h^T W_q,h C_q^1/2 over heads, and
// of its row of shared weights), and the shared head as large as the heads were on average (Frobenius), so
// that an optimizer which scales its steps by a parameter's size sees ordinary parameters. One head stays as
// it is.
void balance(const HeadFactors& heads, SharedHead& merged);

}  // namespace regroup
