#include "trainer/model/parameter_store.h"

#include <algorithm>
#include <thread>

namespace regroup {
namespace {

index_t product(const std::vector<index_t>& shape) {
  index_t result = 1;
  for (const index_t extent : shape) result *= extent;
  return result;
}

// One draw of the parameter's distribution at a global element number.
float draw(const ParameterSpec& spec, const Philox& philox, std::uint64_t element) {
  switch (spec.initializer) {
    case Initializer::kOnes:
      return 1;
    case Initializer::kUniform:
      return static_cast<float>((2 * philox.uniform(element) - 1) * spec.scale);
    case Initializer::kNormal:
      return static_cast<float>(philox.normal(element) * spec.scale);
    case Initializer::kTruncatedNormal:
      break;
  }
  // flax truncated_normal: within two standard deviations of a normal widened so that the result has std
  // `scale`.
  constexpr double kStandardDeviation = 0.87962566103423978;
  for (std::uint64_t attempt = 0;; ++attempt) {
    const double value = attempt == 0 ? philox.normal(element) : philox.child(attempt).normal(element);
    if (value > -2 && value < 2) return static_cast<float>(value * spec.scale / kStandardDeviation);
  }
}

}  // namespace

ParameterStore::ParameterStore(Backend& backend, const ModelConfig& config, const Options& options)
    : backend_(backend), config_(config), compute_(options.compute), table_(parameter_table(config)) {
  constexpr index_t kPackAlignment = 64;  // elements: a cache line in every type
  for (std::size_t i = 0; i < table_.size(); ++i) {
    index_.emplace(table_[i].name, i);
    slices_.push_back(local_slice(table_[i].partition, table_[i].shape, options.tp_rank, options.tp_size));
    shapes_.push_back(local_shape(slices_.back(), table_[i].shape));
    if (table_[i].begins_pack) total_ = (total_ + kPackAlignment - 1) / kPackAlignment * kPackAlignment;
    offsets_.push_back(total_);
    total_ += product(shapes_.back());
  }
  const index_t stat_bytes = total_ * size_of(stat_dtype(compute_));
  masters_ = backend.allocate(stat_bytes);
  if (!compute_is_master()) weights_ = backend.allocate(total_ * size_of(compute_));
  if (options.gradients) gradients_ = backend.allocate(stat_bytes);
}

Tensor ParameterStore::view(const Buffer& buffer, DType dtype, std::size_t index) const {
  return buffer.tensor(dtype, shapes_[index], offsets_[index] * size_of(dtype));
}

Tensor ParameterStore::flat(const Buffer& buffer, DType dtype) const {
  return buffer.tensor(dtype, {total_});
}

std::size_t ParameterStore::find(const std::string& name) const {
  const auto found = index_.find(name);
  check(found != index_.end(), "there is no parameter {}", name);
  return found->second;
}

Parameter ParameterStore::parameter(const std::string& name) const { return pack(name, 1); }

Parameter ParameterStore::pack(const std::string& first, std::size_t count) const {
  const std::size_t begin = find(first);
  std::vector<index_t> shape = shapes_[begin];
  for (std::size_t i = begin + 1; i < begin + count; ++i) {
    check(!table_[i].begins_pack && shapes_[i].back() == shape.back(), "{} does not continue the pack of {}",
          table_[i].name, first);
    shape[0] += shapes_[i][0];
  }
  const auto pack_in = [&](const Buffer& buffer, DType dtype) {
    return buffer.tensor(dtype, shape, offsets_[begin] * size_of(dtype));
  };
  return {.weight = compute_is_master() ? pack_in(masters_, compute_) : pack_in(weights_, compute_),
          .gradient = gradients_.data() == nullptr ? Tensor() : pack_in(gradients_, stat_dtype(compute_))};
}

void ParameterStore::refresh_weights() {
  if (!compute_is_master()) backend_.cast(all_masters(), all_weights());
}

void ParameterStore::initialise(std::uint64_t seed) {
  for (std::size_t i = 0; i < table_.size(); ++i) {
    const std::vector<float> values = initial_values(table_[i], slices_[i], seed);
    if (stat_dtype(compute_) == DType::kFloat64) {
      const std::vector<double> wide(values.begin(), values.end());
      backend_.copy_from_host(wide.data(), master(i));
    } else {
      backend_.copy_from_host(values.data(), master(i));
    }
  }
  refresh_weights();
}

std::vector<float> initial_values(const ParameterSpec& spec, const Slice& slice, std::uint64_t seed) {
  const Philox philox(seed, RandomPurpose::kInitialise, key_of(spec.name));
  const auto dim = static_cast<std::size_t>(slice.dim);
  index_t inner = 1;  // elements of one step along slice.dim
  for (std::size_t d = dim + 1; d < spec.shape.size(); ++d) inner *= spec.shape[d];
  const index_t run = (slice.end - slice.begin) * inner;  // what lies together in the slice
  std::vector<float> values(static_cast<std::size_t>(product(local_shape(slice, spec.shape))));
  const auto fill = [&](index_t begin, index_t end) {
    for (index_t local = begin; local < end; ++local) {
      const index_t global = (local / run) * spec.shape[dim] * inner + slice.begin * inner + local % run;
      values[static_cast<std::size_t>(local)] = draw(spec, philox, static_cast<std::uint64_t>(global));
    }
  };
  const auto size = static_cast<index_t>(values.size());
  const index_t part = size / std::max(1U, std::thread::hardware_concurrency()) + 1;
  std::vector<std::jthread> threads;
  for (index_t begin = part; begin < size; begin += part) {
    threads.emplace_back(fill, begin, std::min(size, begin + part));
  }
  fill(0, std::min(size, part));
  return values;
}

}  // namespace regroup
