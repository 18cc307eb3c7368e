#include "trainer/model/loss.h"

#include <algorithm>
#include <cmath>

namespace regroup {

LanguageModelHead::LanguageModelHead(const ParameterStore& store, int tp_rank)
    : tied_(store.config().tie_word_embeddings),
      weight_(store.parameter(tied_ ? "shared.weight" : "lm_head.weight")),
      first_id_(tp_rank * weight_.weight[0]) {}

index_t LanguageModelHead::chunk_rows(const Backend& backend, index_t rows) const {
  const index_t most = std::max<index_t>(32, backend.piece_elements() / weight_.weight[0]);
  return std::min(rows, most);
}

// The decoder's last output before the product; and its gradient after it.
void LanguageModelHead::scale(Step& step, Tensor x) const {
  if (tied_) step.backend.scale(x, 1 / std::sqrt(static_cast<double>(x[1])));
}

LanguageModelHead::Chunk LanguageModelHead::forward(Step& step, Tensor hidden, Tensor targets, Tensor loss,
                                                    const CrossEntropyOptions& options) const {
  const DType stat = stat_dtype(hidden.dtype);
  const index_t rows = hidden[0];
  const Chunk chunk = {.hidden = hidden,
                       .targets = targets,
                       .logits = step.scratch.allocate(stat, {rows, weight_.weight[0]}),
                       .row_max = step.scratch.allocate(stat, {rows}),
                       .sums = step.scratch.allocate(stat, {2, rows})};
  step.backend.matmul(hidden, weight_.weight, chunk.logits, {.transpose_b = true});
  step.backend.cross_entropy_max(chunk.logits, chunk.row_max);
  step.mesh.tp().all_reduce(chunk.row_max, ReduceOp::kMax);
  step.backend.cross_entropy_sums(chunk.logits, chunk.row_max, targets, chunk.sums, options);
  step.mesh.tp().all_reduce(chunk.sums);
  step.backend.cross_entropy_loss(chunk.row_max, targets, chunk.sums, loss, options);
  return chunk;
}

void LanguageModelHead::evaluate(Step& step, Tensor hidden, Tensor targets, double z_loss,
                                 Tensor loss) const {
  scale(step, hidden);
  const index_t rows = chunk_rows(step.backend, hidden[0]);
  for (index_t begin = 0; begin < hidden[0]; begin += rows) {
    const Arena::Frame frame(step.scratch);
    const index_t end = std::min(hidden[0], begin + rows);
    forward(step, hidden.slice(0, begin, end), targets.slice(0, begin, end), loss,
            {.first_vocabulary_id = first_id_, .z_loss = z_loss});
  }
}

void LanguageModelHead::evaluate_with_gradient(Step& step, Tensor hidden, Tensor targets, double z_loss,
                                               double factor, Tensor loss, Tensor gradient) const {
  const CrossEntropyOptions options = {.first_vocabulary_id = first_id_, .z_loss = z_loss};
  scale(step, hidden);
  const index_t rows = chunk_rows(step.backend, hidden[0]);
  for (index_t begin = 0; begin < hidden[0]; begin += rows) {
    const Arena::Frame frame(step.scratch);
    const index_t end = std::min(hidden[0], begin + rows);
    const Chunk chunk =
        forward(step, hidden.slice(0, begin, end), targets.slice(0, begin, end), loss, options);
    const Tensor dlogits = step.scratch.allocate(hidden.dtype, {end - begin, weight_.weight[0]});
    step.backend.cross_entropy_backward(chunk.logits, chunk.row_max, chunk.targets, chunk.sums, factor,
                                        dlogits, options);
    step.backend.matmul(dlogits, chunk.hidden, weight_.gradient, {.transpose_a = true, .accumulate = true});
    step.backend.matmul(dlogits, weight_.weight, gradient.slice(0, begin, end));
  }
  step.mesh.tp().all_reduce(gradient);
  scale(step, gradient);
}

void LanguageModelHead::logits(Step& step, Tensor hidden, Tensor logits) const {
  scale(step, hidden);
  step.backend.matmul(hidden, weight_.weight, logits, {.transpose_b = true});
}

}  // namespace regroup
