#include <map>
#include <numeric>
#include <set>

#include "kernels/base/error.h"
#include "trainer/formats/t5x.h"

namespace regroup {
namespace {

// The shapes of a model's matrices, with errors that name the one that is missing or impossible.
class Shapes {
 public:
  Shapes(const std::vector<const StoredTensor*>& tensors, std::string_view where) : where_(where) {
    for (const StoredTensor* tensor : tensors) shapes_.emplace(tensor->name, tensor->shape);
  }

  bool has(const std::string& name) const { return shapes_.contains(name); }
  index_t extent(const std::string& name, std::size_t dim) const {
    const auto at = shapes_.find(name);
    if (at == shapes_.end()) fail("it has no '{}'", name);
    if (at->second.size() != 2) fail("'{}' has the shape {}", name, shape_text(at->second));
    return at->second[dim];
  }
  // Whole heads or groups of `width` among the rows of a matrix.
  index_t heads(const std::string& name, index_t width) const {
    const index_t rows = extent(name, 0);
    if (width < 1 || rows < 1 || rows % width != 0) fail("the {} rows of '{}' are not heads", rows, name);
    return rows / width;
  }
  // Layers of a stack: as many as have a first norm, one after the other.
  index_t layers(const std::string& stack) const {
    index_t count = 0;
    while (has(fmt::format("{}.block.{}.layer.0.layer_norm.weight", stack, count))) ++count;
    if (count == 0) fail("it has no {} layers", stack);
    return count;
  }
  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw UserError("{}: {}; give the model's config.json beside it", where_,
                    fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  std::string_view where_;
  std::map<std::string, std::vector<index_t>> shapes_;
};

// The one number of groups, or the largest divisor of the heads that is not above the average.
index_t budget_of(const std::vector<index_t>& groups, index_t heads) {
  const index_t average =
      std::accumulate(groups.begin(), groups.end(), index_t{0}) / static_cast<index_t>(groups.size());
  index_t budget = std::max<index_t>(1, std::min(average, heads));
  while (heads % budget != 0) --budget;
  return budget;
}

}  // namespace

ModelConfig config_of_shapes(const std::vector<const StoredTensor*>& tensors, std::string_view where) {
  const Shapes shapes(tensors, where);
  const std::string encoder = "encoder.block.0.layer.", decoder = "decoder.block.0.layer.";
  const bool relu = shapes.has(encoder + "1.DenseReluDense.wi.weight");
  ModelConfig config;
  config.feed_forward = relu ? FeedForwardKind::kRelu : FeedForwardKind::kGatedGelu;
  config.tie_word_embeddings = !shapes.has("lm_head.weight");
  config.vocab_size = shapes.extent("shared.weight", 0);
  config.d_model = shapes.extent("shared.weight", 1);
  const std::string bias = encoder + "0.SelfAttention.relative_attention_bias.weight";
  config.relative_attention_num_buckets = shapes.extent(bias, 0);
  config.num_heads = shapes.extent(bias, 1);
  config.d_kv = shapes.heads(encoder + "0.SelfAttention.q.weight", config.num_heads);
  config.d_ff = shapes.extent(encoder + "1.DenseReluDense." + (relu ? "wi.weight" : "wi_0.weight"), 0);
  config.num_layers = shapes.layers("encoder");
  config.num_decoder_layers = shapes.layers("decoder");
  config.encoder_kv_groups = shapes.heads(encoder + "0.SelfAttention.k.weight", config.d_kv);
  for (index_t layer = 0; layer < config.num_decoder_layers; ++layer) {
    for (const char* attention : {"0.SelfAttention", "1.EncDecAttention"}) {
      const std::string key = fmt::format("decoder.block.{}.layer.{}.k.weight", layer, attention);
      config.site_kv_groups.push_back(shapes.heads(key, config.d_kv));
    }
  }
  config.kv_groups = budget_of(config.site_kv_groups, config.num_heads);
  if (!config.uneven()) config.site_kv_groups.clear();
  try {
    validate(config);
  } catch (const UserError& error) {
    shapes.fail("{}", error.what());
  }
  return config;
}

}  // namespace regroup
