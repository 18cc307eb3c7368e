// The names of T5's parameters in T5X checkpoints (t5x/examples/t5/network.py) and in transformers'.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace regroup {

// A parameter's name in the other world.
struct OtherName {
  std::string name;
  bool transposed = false;  // T5X holds the transpose of transformers' matrix
};

// "encoder.block.3.layer.0.SelfAttention.q.weight" of "encoder/layers_3/attention/query/kernel". T5 1.1's
// parameters, and those that only T5 1.0 has ("mlp/wi/kernel"). Nothing for any other path.
std::optional<OtherName> name_of_t5x(std::string_view path);
// The way back.
std::optional<OtherName> t5x_name_of(std::string_view name);

}  // namespace regroup
