#include "trainer/formats/names.h"

#include <algorithm>
#include <array>

namespace regroup {
namespace {

// '#' stands for a layer's number.
struct Row {
  std::string_view t5x, transformers;
  bool transposed;
};
constexpr std::array kRows = {
    Row{"token_embedder/embedding", "shared.weight", false},
    Row{"encoder/relpos_bias/rel_embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", true},
    Row{"encoder/layers_#/pre_attention_layer_norm/scale", "encoder.block.#.layer.0.layer_norm.weight",
        false},
    Row{"encoder/layers_#/attention/query/kernel", "encoder.block.#.layer.0.SelfAttention.q.weight", true},
    Row{"encoder/layers_#/attention/key/kernel", "encoder.block.#.layer.0.SelfAttention.k.weight", true},
    Row{"encoder/layers_#/attention/value/kernel", "encoder.block.#.layer.0.SelfAttention.v.weight", true},
    Row{"encoder/layers_#/attention/out/kernel", "encoder.block.#.layer.0.SelfAttention.o.weight", true},
    Row{"encoder/layers_#/pre_mlp_layer_norm/scale", "encoder.block.#.layer.1.layer_norm.weight", false},
    Row{"encoder/layers_#/mlp/wi/kernel", "encoder.block.#.layer.1.DenseReluDense.wi.weight", true},
    Row{"encoder/layers_#/mlp/wi_0/kernel", "encoder.block.#.layer.1.DenseReluDense.wi_0.weight", true},
    Row{"encoder/layers_#/mlp/wi_1/kernel", "encoder.block.#.layer.1.DenseReluDense.wi_1.weight", true},
    Row{"encoder/layers_#/mlp/wo/kernel", "encoder.block.#.layer.1.DenseReluDense.wo.weight", true},
    Row{"encoder/encoder_norm/scale", "encoder.final_layer_norm.weight", false},
    Row{"decoder/relpos_bias/rel_embedding",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", true},
    Row{"decoder/layers_#/pre_self_attention_layer_norm/scale", "decoder.block.#.layer.0.layer_norm.weight",
        false},
    Row{"decoder/layers_#/self_attention/query/kernel", "decoder.block.#.layer.0.SelfAttention.q.weight",
        true},
    Row{"decoder/layers_#/self_attention/key/kernel", "decoder.block.#.layer.0.SelfAttention.k.weight", true},
    Row{"decoder/layers_#/self_attention/value/kernel", "decoder.block.#.layer.0.SelfAttention.v.weight",
        true},
    Row{"decoder/layers_#/self_attention/out/kernel", "decoder.block.#.layer.0.SelfAttention.o.weight", true},
    Row{"decoder/layers_#/pre_cross_attention_layer_norm/scale", "decoder.block.#.layer.1.layer_norm.weight",
        false},
    Row{"decoder/layers_#/encoder_decoder_attention/query/kernel",
        "decoder.block.#.layer.1.EncDecAttention.q.weight", true},
    Row{"decoder/layers_#/encoder_decoder_attention/key/kernel",
        "decoder.block.#.layer.1.EncDecAttention.k.weight", true},
    Row{"decoder/layers_#/encoder_decoder_attention/value/kernel",
        "decoder.block.#.layer.1.EncDecAttention.v.weight", true},
    Row{"decoder/layers_#/encoder_decoder_attention/out/kernel",
        "decoder.block.#.layer.1.EncDecAttention.o.weight", true},
    Row{"decoder/layers_#/pre_mlp_layer_norm/scale", "decoder.block.#.layer.2.layer_norm.weight", false},
    Row{"decoder/layers_#/mlp/wi/kernel", "decoder.block.#.layer.2.DenseReluDense.wi.weight", true},
    Row{"decoder/layers_#/mlp/wi_0/kernel", "decoder.block.#.layer.2.DenseReluDense.wi_0.weight", true},
    Row{"decoder/layers_#/mlp/wi_1/kernel", "decoder.block.#.layer.2.DenseReluDense.wi_1.weight", true},
    Row{"decoder/layers_#/mlp/wo/kernel", "decoder.block.#.layer.2.DenseReluDense.wo.weight", true},
    Row{"decoder/decoder_norm/scale", "decoder.final_layer_norm.weight", false},
    Row{"decoder/logits_dense/kernel", "lm_head.weight", true},
};

// What stands for '#' in a name of this pattern: "" where it has none; nothing where the name is another.
std::optional<std::string_view> number_in(std::string_view name, std::string_view pattern) {
  const std::size_t at = pattern.find('#');
  if (at == std::string_view::npos) {
    if (name != pattern) return std::nullopt;
    return name.substr(0, 0);
  }
  const std::string_view tail = pattern.substr(at + 1);
  if (name.size() < pattern.size() || name.substr(0, at) != pattern.substr(0, at) || !name.ends_with(tail)) {
    return std::nullopt;
  }
  const std::string_view number = name.substr(at, name.size() - at - tail.size());
  constexpr std::size_t kDigits = 6;
  const bool plain = number.size() <= kDigits && (number == "0" || number.front() != '0') &&
                     std::all_of(number.begin(), number.end(), [](char c) { return '0' <= c && c <= '9'; });
  if (!plain) return std::nullopt;
  return number;
}

std::string with_number(std::string_view pattern, std::string_view number) {
  std::string result(pattern);
  if (const std::size_t at = result.find('#'); at != std::string::npos) result.replace(at, 1, number);
  return result;
}

std::optional<OtherName> look_up(std::string_view name, std::string_view Row::*from,
                                 std::string_view Row::*to) {
  for (const Row& row : kRows) {
    if (const auto number = number_in(name, row.*from)) {
      return OtherName{.name = with_number(row.*to, *number), .transposed = row.transposed};
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<OtherName> name_of_t5x(std::string_view path) {
  return look_up(path, &Row::t5x, &Row::transformers);
}

std::optional<OtherName> t5x_name_of(std::string_view name) {
  return look_up(name, &Row::transformers, &Row::t5x);
}

}  // namespace regroup
