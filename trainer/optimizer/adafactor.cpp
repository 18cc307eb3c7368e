#include "trainer/optimizer/adafactor.h"

#include <algorithm>
#include <cmath>

namespace regroup {

// Offsets in elements: `state` into the state buffer, the sums into the buffer they belong to.
struct Adafactor::Plan {
  bool factored = false;
  index_t rows = 0, columns = 0;  // local
  index_t state = 0;              // row then column, or the full moment
  bool row_partial = false, column_partial = false;
  index_t row_sums = 0, column_sums = 0;
  // Totals over the parameters up to and with this one.
  index_t state_end = 0, sums_end = 0, extra_end = 0;
};

std::vector<Adafactor::Plan> Adafactor::plan(const ParameterStore& store, const Options& options,
                                             int tp_size) {
  std::vector<Plan> result;
  index_t state = 0, sums = 0, extra = 0;
  for (std::size_t i = 0; i < store.size(); ++i) {
    const ParameterSpec& spec = store.table()[i];
    const Tensor local = as_matrix(store.master(i));
    const Slice& slice = store.slice(i);
    const bool split = tp_size > 1 && spec.partition.kind != Partition::Kind::kReplicated;
    Plan plan{.factored = spec.shape.size() == 2 &&
                          std::min(spec.shape[0], spec.shape[1]) >= options.min_dim_size_to_factor,
              .rows = local[0],
              .columns = local[1],
              .state = state,
              .row_partial = split && slice.dim == 1,
              .column_partial = split && slice.dim == 0};
    if (plan.factored) {
      index_t& row_home = plan.row_partial ? extra : sums;
      plan.row_sums = row_home;
      row_home += plan.rows;
      index_t& column_home = plan.column_partial ? extra : sums;
      plan.column_sums = column_home;
      column_home += plan.columns;
    }
    state += plan.factored ? plan.rows + plan.columns : plan.rows * plan.columns;
    plan.state_end = state;
    plan.sums_end = sums;
    plan.extra_end = extra;
    result.push_back(plan);
  }
  return result;
}

Adafactor::Adafactor(Backend& backend, ParameterStore& store, const Mesh& mesh, const Options& options)
    : backend_(backend),
      store_(store),
      options_(options),
      plan_(plan(store, options, mesh.tp_size())),
      state_(backend.allocate(plan_.back().state_end * size_of(stat_dtype(store.compute_dtype())))),
      sums_(backend.allocate(plan_.back().sums_end * size_of(DType::kFloat64))),
      totals_(backend, store, mesh, plan_.back().extra_end) {
  const DType stat = stat_dtype(store.compute_dtype());
  const auto sums_at = [this](bool partial, index_t begin, index_t size) {
    return partial ? totals_.extra(begin, size)
                   : sums_.tensor(DType::kFloat64, {size}, begin * size_of(DType::kFloat64));
  };
  const std::vector<index_t> offsets = offsets_of(store, options.step_offset, options.step_offsets);
  for (std::size_t i = 0; i < store.size(); ++i) {
    const Plan& p = plan_[i];
    const std::vector<index_t>& shape = store.table()[i].shape;
    AdafactorSlot slot{.weight = as_matrix(store.master(i)),
                       .gradient = as_matrix(store.gradient(i)),
                       .totals = totals_.row(i),
                       .global_rows = shape.size() == 2 ? shape[0] : 1,
                       .global_columns = shape.back()};
    if (p.factored) {
      slot.row = state_.tensor(stat, {p.rows}, p.state * size_of(stat));
      slot.column = state_.tensor(stat, {p.columns}, (p.state + p.rows) * size_of(stat));
      slot.row_sums = sums_at(p.row_partial, p.row_sums, p.rows);
      slot.column_sums = sums_at(p.column_partial, p.column_sums, p.columns);
    } else {
      slot.second_moment = state_.tensor(stat, {p.rows, p.columns}, p.state * size_of(stat));
    }
    slots_.push_back(slot);
    slots_by_offset_[offsets[i]].push_back(slot);
  }
}

Adafactor::~Adafactor() = default;

double Adafactor::do_update(index_t step, double learning_rate, const Verdict& takes) {
  AdafactorOptions options = {.learning_rate = learning_rate,
                              .epsilon_gradient = options_.epsilon_gradient,
                              .epsilon_parameter = options_.epsilon_parameter,
                              .clipping_threshold = options_.clipping_threshold};
  const auto statistics = [&] {
    backend_.adafactor_statistics(slots_, options);
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (totals_.gives(i) || !plan_[i].factored) continue;
      if (plan_[i].row_partial) backend_.fill_zero(slots_[i].row_sums);
      if (plan_[i].column_partial) backend_.fill_zero(slots_[i].column_sums);
    }
    return std::sqrt(totals_.reduce_statistics());
  };
  const double norm = statistics();
  if (!takes(norm)) return norm;
  if (options_.max_gradient_norm > 0 && norm > options_.max_gradient_norm) {
    backend_.scale(store_.all_gradients(), options_.max_gradient_norm / norm);
    statistics();
  }
  for (const auto& [offset, slots] : slots_by_offset_) {
    options.beta2 = 1 - std::pow(static_cast<double>(step - offset + 1), -options_.decay_rate);
    backend_.adafactor_moments(slots, options);
  }
  totals_.reduce_moments();
  backend_.adafactor_update(slots_, options);
  store_.refresh_weights();
  return norm;
}

std::vector<ShardedTensor> Adafactor::state() const {
  std::vector<ShardedTensor> result;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const ParameterSpec& spec = store_.table()[i];
    const Slice& slice = store_.slice(i);
    if (!plan_[i].factored) {
      Tensor local = slots_[i].second_moment;
      if (spec.shape.size() == 1) local = local.reshape({local.numel()});
      result.push_back({spec.name + ".second_moment", spec.shape, slice, local});
      continue;
    }
    // A vector along the split dimension is split with it; the other one is whole on every rank.
    const auto vector_of = [&](int dim, const char* slot, Tensor local) {
      Slice part = slice;
      if (dim != slice.dim) {
        part = {.dim = 0, .begin = 0, .end = spec.shape[static_cast<std::size_t>(dim)]};
        part.replica = totals_.tp_rank();
        part.replicas = totals_.tp_size();
      }
      part.dim = 0;
      result.push_back({spec.name + slot, {spec.shape[static_cast<std::size_t>(dim)]}, part, local});
    };
    vector_of(0, ".second_moment_row", slots_[i].row);
    vector_of(1, ".second_moment_column", slots_[i].column);
  }
  return result;
}

}  // namespace regroup
