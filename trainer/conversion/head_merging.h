// The best shared head of a group (docs/conversion.md). Heads enter attention through products of two factors
// only: scores through W_q,h^T W_k,h, outputs through W_o,h W_v,h. One shared right factor (K or V) and one
// new left factor per head (Q or O) are a low-rank approximation with a closed form.
#pragma once

#include <span>
#include <vector>

#include "trainer/conversion/dense_matrix.h"

namespace regroup {

// Key/value heads, n of them, as products of two factors in the measure in which losses count: B_h is W_k,h L
// or W_v,h L with the second moments L L^T of what it reads, R_h the triangular factor of what is on the
// other side: R_h^T R_h = sum W_q C_q W_q^T over the query heads of h, or sum W_o^T W_o.
struct HeadProducts {
  std::vector<Matrix> left;  // R_h [d_kv, d_kv]
  Matrix right;              // B_h [d_kv, d_model], one below the other

  index_t heads() const { return static_cast<index_t>(left.size()); }
  index_t d_kv() const { return right.rows / heads(); }
  // Some of them.
  HeadProducts of(std::span<const index_t> some) const;
};

// What becomes of them: shared weights = combine W, W of all heads one below the other; W_q,h becomes
// mix[h]^T W_q,h and W_o,h becomes W_o,h mix[h].
struct SharedHead {
  Matrix combine;           // [d_kv, n d_kv]
  std::vector<Matrix> mix;  // n of [d_kv, d_kv]
};

// Minimises  sum_h || R_h (B_h - mix_h combine B) ||_F^2  over combine and mix: with the singular value
// decomposition of the R_h B_h one below the other, combine B are its leading d_kv right singular vectors
// (Eckart and Young). One head stays as it is, to the bit. Directions that carry nothing are filled from the
// first head's, with nothing of them in mix.
SharedHead merge_heads(const HeadProducts& heads);

// The sum above for any `merged`, and for combine = mix = 0, which is the whole of it.
double merging_loss(const HeadProducts& heads, const SharedHead& merged);
double merging_energy(const HeadProducts& heads);

// The mean of the heads, or the first, with every left factor as it was.
SharedHead mean_head(index_t heads, index_t d_kv);
SharedHead first_head(index_t heads, index_t d_kv);

}  // namespace regroup
