#include "trainer/optimizer/adamw.h"

#include <cmath>

namespace regroup {

AdamW::AdamW(Backend& backend, ParameterStore& store, const Mesh& mesh, const Options& options)
    : backend_(backend),
      store_(store),
      options_(options),
      state_(backend.allocate(2 * store.all_masters().bytes())),
      totals_(backend, store, mesh) {
  const DType stat = stat_dtype(store.compute_dtype());
  const std::vector<index_t> offsets = offsets_of(store, options.step_offset, options.step_offsets);
  index_t offset = 0;
  const index_t second = store.all_masters().bytes();
  for (std::size_t i = 0; i < store.size(); ++i) {
    const Tensor weight = as_matrix(store.master(i));
    index_t global_size = 1;
    for (const index_t extent : store.table()[i].shape) global_size *= extent;
    slots_.push_back({.weight = weight,
                      .gradient = as_matrix(store.gradient(i)),
                      .first_moment = state_.tensor(stat, {weight[0], weight[1]}, offset),
                      .second_moment = state_.tensor(stat, {weight[0], weight[1]}, second + offset),
                      .totals = totals_.row(i),
                      .global_size = global_size,
                      .decay = store.table()[i].initializer != Initializer::kOnes &&
                               store.table()[i].initializer != Initializer::kUniform});
    slots_by_offset_[offsets[i]].push_back(slots_.back());
    offset += weight.bytes();
  }
}

double AdamW::do_update(index_t step, double learning_rate, const Verdict& takes) {
  backend_.adamw_statistics(slots_);
  const double norm = std::sqrt(totals_.reduce_statistics());
  if (!takes(norm)) return norm;
  if (options_.max_gradient_norm > 0 && norm > options_.max_gradient_norm) {
    backend_.scale(store_.all_gradients(), options_.max_gradient_norm / norm);
  }
  for (const auto& [offset, slots] : slots_by_offset_) {
    backend_.adamw_update(slots, {.learning_rate = learning_rate,
                                  .beta1 = options_.beta1,
                                  .beta2 = options_.beta2,
                                  .epsilon = options_.epsilon,
                                  .weight_decay = options_.weight_decay,
                                  .step = step - offset + 1,
                                  .scale_by_rms = options_.scale_by_rms});
  }
  store_.refresh_weights();
  return norm;
}

std::vector<ShardedTensor> AdamW::state() const {
  std::vector<ShardedTensor> result;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const ParameterSpec& spec = store_.table()[i];
    const auto like_weight = [&spec](Tensor moment) {
      return spec.shape.size() == 1 ? moment.reshape({moment.numel()}) : moment;
    };
    result.push_back(
        {spec.name + ".first_moment", spec.shape, store_.slice(i), like_weight(slots_[i].first_moment)});
    result.push_back(
        {spec.name + ".second_moment", spec.shape, store_.slice(i), like_weight(slots_[i].second_moment)});
  }
  return result;
}

}  // namespace regroup
