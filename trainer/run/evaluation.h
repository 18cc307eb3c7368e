// Held-out loss.
#pragma once

#include "trainer/run/model_runner.h"

namespace regroup {

// The sums over the first `count` samples (or all there are), shared out over data-parallel ranks in
// micro-batches of at most `micro_batch`. The same samples and masks on every call and in any layout.
// Collective over the mesh.
LossSums evaluate(ModelRunner& runner, const Mesh& mesh, const Samples& samples, index_t count,
                  index_t micro_batch);

// The cross-entropy, nats per token, of held-out targets under the frequencies of `training` samples' targets
// (each id counted once more than seen): what a model knows that has learnt the frequency of words and
// nothing else. Over the first `count` samples of each.
double unigram_loss(const Samples& training, const Samples& heldout, index_t count, index_t vocab_size);

}  // namespace regroup
