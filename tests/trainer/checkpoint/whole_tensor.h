// Whole tensors of a checkpoint, for comparing.
#pragma once

#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "trainer/formats/checkpoint_reader.h"

namespace regroup::test {

inline std::vector<float> whole_tensor(const CheckpointReader& reader, const std::string& name) {
  const StoredTensor* stored = reader.find(name);
  check(stored != nullptr, "there is no {}", name);
  const index_t count =
      std::accumulate(stored->shape.begin(), stored->shape.end(), index_t{1}, std::multiplies<>());
  std::vector<float> values(static_cast<std::size_t>(count));
  const index_t rows = stored->shape.empty() ? 1 : stored->shape[0];
  reader.read(name, 0, 0, rows, Tensor(values.data(), DType::kFloat32, stored->shape));
  return values;
}

}  // namespace regroup::test
