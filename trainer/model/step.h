// What every module needs to run: where it computes, where its memory is, who it talks to, what is random.
#pragma once

#include "kernels/arena.h"
#include "kernels/backend.h"
#include "parallel/mesh.h"

namespace regroup {

class AttentionProbe;

// Legend of this folder: N tokens = B x length, S source and T target length, D d_model, C d_kv, F d_ff of
// this rank, H query heads and G key/value groups of this rank, V vocabulary of this rank.
struct Step {
  Backend& backend;
  Arena& saved;    // what backward needs; lives until the micro-batch's backward is done
  Arena& scratch;  // what the current sub-block needs
  const Mesh& mesh;
  double dropout_rate = 0;          // 0 outside training
  Philox dropout_key;               // of this optimizer step
  index_t first_sample = 0;         // number of this micro-batch's first sample within the global batch
  bool recompute = false;           // layers keep their input only and run forward again in backward
  AttentionProbe* probe = nullptr;  // looks on at every attention's forward; not in training

  // Dropout of [N, width] activations at `site` (a number unique in the model), where this rank holds the
  // columns from first_column of `columns` and each sample has `length` rows.
  Dropout dropout(index_t site, index_t length, index_t columns, index_t first_column = 0) const {
    return {.rate = dropout_rate,
            .key = dropout_key.child(static_cast<std::uint64_t>(site)),
            .first_row = first_sample * length,
            .first_column = first_column,
            .columns = columns};
  }
};

}  // namespace regroup
