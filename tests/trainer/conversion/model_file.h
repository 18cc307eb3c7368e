// Tiny models in files, and what conversion makes of them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "tests/trainer/conversion/matrices.h"
#include "tests/trainer/formats/plain_file.h"
#include "trainer/conversion/regroup.h"
#include "trainer/model/parameters.h"

namespace regroup::test {

inline ModelConfig model(index_t groups, index_t encoder_groups) {
  ModelConfig config;
  config.vocab_size = 24;
  config.d_model = 12;
  config.d_kv = 5;
  config.d_ff = 16;
  config.num_heads = 8;
  config.num_layers = 2;
  config.num_decoder_layers = 2;
  config.kv_groups = groups;
  config.encoder_kv_groups = encoder_groups;
  return config;
}

inline index_t count_of(const std::vector<index_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies<>());
}

using Model = std::map<std::string, std::vector<float>>;  // whole tensors by name

inline Model random_model(const ModelConfig& config) {
  Model result;
  for (const ParameterSpec& spec : parameter_table(config)) {
    const Philox philox(3, RandomPurpose::kTest, key_of(spec.name));
    auto& values = result[spec.name];
    for (index_t i = 0; i < count_of(spec.shape); ++i) {
      values.push_back(static_cast<float>(philox.normal(static_cast<std::uint64_t>(i))));
    }
  }
  return result;
}

enum class Storage { kFloat32, kBFloat16 };

inline void write_model(const std::filesystem::path& path, const ModelConfig& config, const Model& values,
                        Storage storage = Storage::kFloat32) {
  std::vector<PlainTensor> tensors;
  for (const ParameterSpec& spec : parameter_table(config)) {
    const auto& floats = values.at(spec.name);
    if (storage == Storage::kFloat32) {
      tensors.push_back(plain_tensor(spec.name, spec.shape, floats));
    } else {
      std::vector<bfloat16> narrow;
      for (const float v : floats) narrow.emplace_back(v);
      tensors.push_back({spec.name, StoredType::kBF16, spec.shape, bytes_of(narrow)});
    }
  }
  write_plain_file(path, tensors);
}

// Adds one rank's slice to whole tensors; `filled` is 1 where an element was there, which must be equal.
inline void put_slice(const ShardedTensor& t, std::vector<float>& whole, std::vector<float>& filled) {
  whole.resize(static_cast<std::size_t>(count_of(t.shape)));
  filled.resize(whole.size());
  const index_t width = t.shape.size() == 2 ? t.shape[1] : 1;
  const index_t local_width = t.slice.dim == 1 ? t.slice.end - t.slice.begin : width;
  for (index_t i = 0; i < t.local.numel(); ++i) {
    const index_t row = i / local_width + (t.slice.dim == 0 ? t.slice.begin : 0);
    const index_t column = i % local_width + (t.slice.dim == 1 ? t.slice.begin : 0);
    const auto at = static_cast<std::size_t>(row * width + column);
    const float found = t.local.as<float>()[i];
    EXPECT_TRUE(filled[at] == 0 || whole[at] == found) << t.name;
    whole[at] = found;
    filled[at] = 1;
  }
}

// Loads every tensor-parallel rank's slices and puts the whole tensors together; replicas must agree.
inline Model load(const CheckpointReader& reader, const ModelConfig& parent, const ConversionPlan& plan,
                  int tp) {
  Model whole, seen;
  for (int rank = 0; rank < tp; ++rank) {
    const ConvertingReader converting(reader, parent, plan.target, plan);
    for (const ParameterSpec& spec : parameter_table(plan.target)) {
      const Slice slice = local_slice(spec.partition, spec.shape, rank, tp);
      const auto shape = local_shape(slice, spec.shape);
      std::vector<float> values(static_cast<std::size_t>(count_of(shape)), -77);
      const ShardedTensor tensor = {.name = spec.name,
                                    .shape = spec.shape,
                                    .slice = slice,
                                    .local = Tensor(values.data(), DType::kFloat32, shape)};
      converting.read(tensor);
      put_slice(tensor, whole[spec.name], seen[spec.name]);
    }
  }
  for (const auto& [name, filled] : seen) {
    EXPECT_EQ(std::count(filled.begin(), filled.end(), 0.0F), 0) << name;
  }
  return whole;
}

// Plans and loads. Collective over the world.
inline Model convert(const std::filesystem::path& path, const ModelConfig& parent, const ModelConfig& target,
                     const ConversionOptions& options = {}, int tp = 1) {
  const CheckpointReader reader(path);
  return load(reader, parent, plan_conversion(ProcessGroup::world(), reader, parent, target, options), tp);
}

inline Matrix matrix_of(const Model& values, const std::string& name, index_t columns) {
  const std::vector<float>& floats = values.at(name);
  Matrix result(std::ssize(floats) / columns, columns);
  std::copy(floats.begin(), floats.end(), result.values.begin());
  return result;
}

// The products by which query head `head` enters: W_q^T W_k and W_o W_v.
struct HeadProduct {
  Matrix scores, outputs;
};

inline HeadProduct product_of(const Model& values, const ModelConfig& config, const AttentionSite& site,
                              index_t head) {
  const index_t d = config.d_kv, width = config.d_model;
  const index_t shared = head / (config.num_heads / site.kv_groups);
  const auto rows = [&](const char* name, index_t at) {
    return matrix_of(values, site.prefix + name, width).row_block(at * d, (at + 1) * d);
  };
  const Matrix o = matrix_of(values, site.prefix + "o.weight", config.num_heads * d)
                       .column_block(head * d, (head + 1) * d);
  return {.scores = product(rows("q.weight", head), rows("k.weight", shared), Transpose::kYes),
          .outputs = product(o, rows("v.weight", shared))};
}

// || a - b || / || a ||.
inline double relative_distance(const Matrix& a, const Matrix& b) {
  return std::sqrt(sum(a, b, -1).squared_norm() / a.squared_norm());
}

}  // namespace regroup::test
