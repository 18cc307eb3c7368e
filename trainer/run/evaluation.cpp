#include "trainer/run/evaluation.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace regroup {

LossSums evaluate(ModelRunner& runner, const Mesh& mesh, const Samples& samples, index_t count,
                  index_t micro_batch) {
  count = std::min<index_t>(count, samples.windows());
  const index_t begin = count * mesh.dp_rank() / mesh.dp_size();
  const index_t end = count * (mesh.dp_rank() + 1) / mesh.dp_size();
  Batch batch;
  for (index_t first = begin; first < end; first += micro_batch) {
    make_batch(samples, {.first_sample = first, .count = std::min(micro_batch, end - first)}, batch);
    runner.evaluate(batch);
  }
  return runner.take_losses();
}

double unigram_loss(const Samples& training, const Samples& heldout, index_t count, index_t vocab_size) {
  std::vector<double> seen(static_cast<std::size_t>(vocab_size), 1.0);
  auto total = static_cast<double>(vocab_size);
  for (index_t n = 0; n < std::min<index_t>(count, training.windows()); ++n) {
    const Sample sample = training(n);
    for (const std::int32_t id : sample.targets) seen[static_cast<std::size_t>(id)] += 1;
    total += static_cast<double>(sample.targets.size());
  }
  double loss = 0, tokens = 0;
  for (index_t n = 0; n < std::min<index_t>(count, heldout.windows()); ++n) {
    const Sample sample = heldout(n);
    for (const std::int32_t id : sample.targets) {
      loss -= std::log(seen[static_cast<std::size_t>(id)] / total);
      tokens += 1;
    }
  }
  return loss / tokens;
}

}  // namespace regroup
