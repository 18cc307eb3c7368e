#include "trainer/optimizer/optimizer.h"

namespace regroup {
namespace {

constexpr index_t kTotals = 4;

}  // namespace

UpdateTotals::UpdateTotals(Backend& backend, const ParameterStore& store, const Mesh& mesh, index_t extra)
    : backend_(backend),
      store_(store),
      mesh_(mesh),
      buffer_(backend.allocate((static_cast<index_t>(store.size()) * kTotals + extra) *
                               size_of(DType::kFloat64))),
      host_(store.size() * kTotals) {}

Tensor UpdateTotals::row(std::size_t parameter) const {
  return buffer_.tensor(DType::kFloat64, {kTotals},
                        static_cast<index_t>(parameter) * kTotals * size_of(DType::kFloat64));
}

Tensor UpdateTotals::extra(index_t begin, index_t size) const {
  return buffer_.tensor(DType::kFloat64, {size},
                        (static_cast<index_t>(host_.size()) + begin) * size_of(DType::kFloat64));
}

void UpdateTotals::reduce(index_t elements) {
  const Tensor matrix = buffer_.tensor(DType::kFloat64, {static_cast<index_t>(host_.size())});
  backend_.copy_from_host(host_.data(), matrix);
  mesh_.tp().all_reduce(buffer_.tensor(DType::kFloat64, {elements}));
  backend_.copy_to_host(matrix, host_.data());
}

double UpdateTotals::reduce_statistics() {
  backend_.copy_to_host(buffer_.tensor(DType::kFloat64, {static_cast<index_t>(host_.size())}), host_.data());
  for (std::size_t i = 0; i < store_.size(); ++i) {
    if (gives(i)) continue;
    host_[i * kTotals] = 0;
    host_[i * kTotals + 1] = 0;
  }
  reduce(buffer_.bytes() / size_of(DType::kFloat64));
  double squared_norm = 0;
  for (std::size_t i = 0; i < store_.size(); ++i) squared_norm += host_[i * kTotals + 1];
  return squared_norm;
}

void UpdateTotals::reduce_moments() {
  backend_.copy_to_host(buffer_.tensor(DType::kFloat64, {static_cast<index_t>(host_.size())}), host_.data());
  for (std::size_t i = 0; i < store_.size(); ++i) {
    double* const totals = &host_[i * kTotals];
    if (mesh_.tp_rank() != 0) totals[0] = totals[1] = 0;  // global already: counted once
    if (!gives(i)) totals[2] = 0;
    const bool rows_are_split = store_.slice(i).dim == 0;
    if (!(rows_are_split ? gives(i) : mesh_.tp_rank() == 0)) totals[3] = 0;
  }
  reduce(static_cast<index_t>(host_.size()));
}

std::vector<index_t> offsets_of(const ParameterStore& store, index_t step_offset,
                                const MomentOffsets& others) {
  std::vector<index_t> result;
  for (const ParameterSpec& spec : store.table()) {
    const auto other = others.find(spec.name);
    result.push_back(other == others.end() ? step_offset : other->second);
  }
  return result;
}

Tensor as_matrix(Tensor tensor) { return tensor.rank == 1 ? tensor.reshape({1, tensor[0]}) : tensor; }

}  // namespace regroup
