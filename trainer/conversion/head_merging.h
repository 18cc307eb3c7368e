// The best shared head of a group (docs/conversion.md). Heads enter attention through products of two factors
// only: scores through W_q,h^T W_k,h, outputs through W_o,h W_v,h. One shared right factor (K or V) and one
// new left factor per head (Q or O) are a low-rank approximation with a closed form.
#pragma once

#include <span>
#include <vector>

#include "trainer/conversion/dense_matrix.h"

namespace regroup {

// The heads of a group, n of them, as the product left_h right_h: right_h [d_kv, d_model] is W_k,h or W_v,h.
struct HeadProducts {
  // R_h [d_kv, d_kv] with R_h^T R_h = left_h^T C left_h: of queries W_q,h C_q W_q,h^T, of outputs
  // W_o,h^T W_o,h.
  std::vector<Matrix> left;
  Matrix right;  // [n d_kv, d_model], one below the other
  // L [d_model, d_model], L L^T = C: second moments of what the right factors read. Empty: the identity.
  Matrix inputs;

  index_t heads() const { return static_cast<index_t>(left.size()); }
  index_t d_kv() const { return right.rows / heads(); }
};

// shared = combine right, and left_h becomes left_h mix[h].
struct SharedHead {
  Matrix combine;           // [d_kv, n d_kv]
  std::vector<Matrix> mix;  // n of [d_kv, d_kv]
};

// Minimises  sum_h || R_h (right_h - mix_h combine right) L ||_F^2  over combine and mix: with the singular
// value decomposition of Z, the R_h right_h L one below the other, combine right L are its leading d_kv right
// singular vectors. One head stays as it is, to the bit. Directions that carry nothing are filled from the
// first head's, with nothing of them in mix.
SharedHead merge_heads(const HeadProducts& heads);

// The sum above for any `merged`, and for combine = mix = 0, which is the whole of it.
double merging_loss(const HeadProducts& heads, const SharedHead& merged);
double merging_energy(const HeadProducts& heads);

// The mean of the heads, or the first, with every left factor as it was.
SharedHead mean_head(index_t heads, index_t d_kv);
SharedHead first_head(index_t heads, index_t d_kv);

}  // namespace regroup
