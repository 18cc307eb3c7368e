#include "trainer/model/config.h"

#include <algorithm>
#include <map>
#include <set>

#include <fmt/ranges.h>

#include "kernels/base/json.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

using nlohmann::json;

ModelConfig multi_head(index_t d_model, index_t d_ff, index_t num_heads, index_t layers) {
  return {.d_model = d_model,
          .d_ff = d_ff,
          .num_heads = num_heads,
          .num_layers = layers,
          .num_decoder_layers = layers,
          .kv_groups = num_heads,
          .encoder_kv_groups = num_heads};
}

// references: t5x/examples/t5/t5_1_1/*.gin. `tiny` is ours: large enough to learn, small enough for two
// cores.
std::map<std::string, ModelConfig> sizes() {
  return {{"tiny", multi_head(256, 512, 8, 4)},    {"small", multi_head(512, 1024, 6, 8)},
          {"base", multi_head(768, 2048, 12, 12)}, {"large", multi_head(1024, 2816, 16, 24)},
          {"xl", multi_head(2048, 5120, 32, 24)},  {"xxl", multi_head(4096, 10240, 64, 24)}};
}

std::vector<index_t> divisors(index_t number) {
  std::vector<index_t> result;
  for (index_t d = 1; d <= number; ++d) {
    if (number % d == 0) result.push_back(d);
  }
  return result;
}

void validate_groups(const std::string& option, index_t groups, index_t num_heads) {
  if (groups < 1 || groups > num_heads || num_heads % groups != 0) {
    throw UserError("{} = {} does not divide the {} attention heads; use one of {}", option, groups,
                    num_heads, fmt::join(divisors(num_heads), ", "));
  }
}

void validate_sites(const ModelConfig& config) {
  if (config.site_kv_groups.empty()) return;
  const auto count = static_cast<index_t>(config.site_kv_groups.size());
  if (count != 2 * config.num_decoder_layers) {
    throw UserError(
        "there are kv-groups of {} decoder attentions; {} layers have {}, a self- and a cross-attention each",
        count, config.num_decoder_layers, 2 * config.num_decoder_layers);
  }
  for (const AttentionSite& site : attention_sites(config)) {
    validate_groups("kv-groups of " + describe(site), site.kv_groups, config.num_heads);
  }
}

// A value as an error shows it: one short line, whatever it is.
std::string shown(const json& value) {
  if (value.is_structured()) return value.is_array() ? "a list" : "an object";
  constexpr std::size_t kMost = 60;
  const std::string text = json_text(value);
  return text.size() <= kMost ? text : text.substr(0, kMost) + "...";
}

// A number of heads, layers, groups, ...
bool is_count(const json& value) {
  return value.is_number_integer() && value.get<index_t>() >= 1 && value.get<index_t>() <= index_t{1} << 40;
}

// One typed field of a config.json, with errors that name it.
class Fields {
 public:
  Fields(const json& object, const std::string& where) : object_(object), where_(where) {}

  index_t count(const char* name) const {
    const json& value = at(name);
    if (!is_count(value)) {
      throw UserError("{}: \"{}\" is {}; a positive whole number is needed", where_, name, shown(value));
    }
    return value.get<index_t>();
  }
  // `length` positive whole numbers under `name` of the object `parent`.
  std::vector<index_t> counts(const char* parent, const char* name, index_t length) const {
    const json& object = at(parent);
    if (!object.is_object() || !object.contains(name) || !object[name].is_array()) {
      throw UserError("{}: \"{}\" has no list \"{}\"", where_, parent, name);
    }
    const json& list = object[name];
    if (static_cast<index_t>(list.size()) != length) {
      throw UserError("{}: \"{}\" of \"{}\" has {} numbers; {} are needed, one for each decoder layer",
                      where_, name, parent, list.size(), length);
    }
    std::vector<index_t> result;
    for (const json& value : list) {
      if (!is_count(value)) {
        throw UserError("{}: \"{}\" of \"{}\" holds {} for layer {}; a positive whole number is needed",
                        where_, name, parent, shown(value), result.size());
      }
      result.push_back(value.get<index_t>());
    }
    return result;
  }
  index_t count(const char* name, index_t otherwise) const { return has(name) ? count(name) : otherwise; }
  double number(const char* name, double otherwise) const {
    if (!has(name)) return otherwise;
    if (!at(name).is_number())
      throw UserError("{}: \"{}\" is {}; a number is needed", where_, name, shown(at(name)));
    return at(name).get<double>();
  }
  bool truth(const char* name, bool otherwise) const {
    if (!has(name)) return otherwise;
    if (!at(name).is_boolean())
      throw UserError("{}: \"{}\" is {}; true or false is needed", where_, name, shown(at(name)));
    return at(name).get<bool>();
  }
  // One of two texts; a file with another value is refused for the `reason`.
  std::string choice(const char* name, const char* one, const char* other, const char* otherwise,
                     const char* reason) const {
    if (!has(name)) return otherwise;
    if (!is(name, one) && !is(name, other)) {
      throw UserError("{}: \"{}\" is {}, only \"{}\" or \"{}\" can be read: {}", where_, name,
                      shown(at(name)), one, other, reason);
    }
    return at(name).get<std::string>();
  }
  // Refuses a file whose field is present and differs from what `source`, another field, makes of it.
  void require(const char* name, const json& value, const char* source) const {
    if (has(name) && at(name) != value) {
      throw UserError("{}: \"{}\" is {}, which is not the {} of its \"{}\"", where_, name, shown(at(name)),
                      json_text(value), source);
    }
  }
  bool is(const char* name, const json& value) const { return has(name) && at(name) == value; }
  bool has(const char* name) const { return object_.contains(name) && !object_[name].is_null(); }

 private:
  const json& at(const char* name) const {
    if (!has(name)) throw UserError("{}: the field \"{}\" is missing", where_, name);
    return object_[name];
  }
  const json& object_;
  const std::string& where_;
};

std::vector<index_t> site_groups_from(const Fields& fields, index_t layers) {
  constexpr const char* kName = "decoder_num_key_value_heads";
  if (!fields.has(kName)) return {};
  const std::vector<index_t> self = fields.counts(kName, "self", layers);
  const std::vector<index_t> cross = fields.counts(kName, "cross", layers);
  std::vector<index_t> result;
  for (std::size_t layer = 0; layer < self.size(); ++layer) {
    result.insert(result.end(), {self[layer], cross[layer]});
  }
  return result;
}

// What T5Config makes of feed_forward_proj.
struct Activation {
  const char *feed_forward_proj, *dense_act_fn;
  bool is_gated_act;
};

Activation activation_of(FeedForwardKind kind) {
  if (kind == FeedForwardKind::kRelu) return {"relu", "relu", false};
  return {"gated-gelu", "gelu_new", true};
}

FeedForwardKind feed_forward_from(const Fields& fields, const char* otherwise) {
  constexpr const char* kName = "feed_forward_proj";
  const std::string text =
      fields.choice(kName, "gated-gelu", "relu", otherwise, "no T5 has another activation");
  const FeedForwardKind kind = text == "relu" ? FeedForwardKind::kRelu : FeedForwardKind::kGatedGelu;
  // Where a file has these two, it is they that transformers computes with.
  const Activation activation = activation_of(kind);
  fields.require("dense_act_fn", activation.dense_act_fn, kName);
  fields.require("is_gated_act", activation.is_gated_act, kName);
  return kind;
}

// transformers 5 writes tie_word_embeddings true for every T5 and mT5. It tells T5s apart by
// scale_decoder_outputs; an mT5 always has an lm_head of its own.
void read_architecture(const Fields& fields, ModelConfig& config) {
  const bool umt5 = fields.is("model_type", "umt5");
  const std::string type =
      fields.is("model_type", "regroup_t5")  // what --export hf writes
          ? "t5"
          : fields.choice("model_type", "t5", "mt5", "t5",
                          umt5 ? "each layer of a UMT5 has a relative position bias of its "
                                 "own, those of a T5 share the first one's"
                               : "this is another architecture");
  config.feed_forward = feed_forward_from(fields, type == "t5" ? "relu" : "gated-gelu");
  const bool tied = fields.truth("tie_word_embeddings", true) && type == "t5";
  config.tie_word_embeddings = fields.truth("scale_decoder_outputs", tied);
}

}  // namespace

index_t ModelConfig::self_groups(index_t layer) const {
  return site_kv_groups.empty() ? kv_groups : site_kv_groups.at(static_cast<std::size_t>(2 * layer));
}

index_t ModelConfig::cross_groups(index_t layer) const {
  return site_kv_groups.empty() ? kv_groups : site_kv_groups.at(static_cast<std::size_t>(2 * layer + 1));
}

bool ModelConfig::uneven() const {
  return std::any_of(site_kv_groups.begin(), site_kv_groups.end(),
                     [this](index_t groups) { return groups != kv_groups; });
}

std::vector<index_t> ModelConfig::all_kv_groups() const {
  std::set<index_t> all(site_kv_groups.begin(), site_kv_groups.end());
  if (all.empty()) all.insert(kv_groups);
  all.insert(encoder_kv_groups);
  return {all.begin(), all.end()};
}

ModelConfig t5_1_1(const std::string& size) {
  const auto all = sizes();
  const auto found = all.find(size);
  if (found == all.end()) {
    throw UserError("there is no model size '{}'{}; the sizes are {}", size,
                    did_you_mean(size, model_sizes()), fmt::join(model_sizes(), ", "));
  }
  return found->second;
}

std::vector<std::string> model_sizes() { return {"tiny", "small", "base", "large", "xl", "xxl"}; }

void validate(const ModelConfig& config) {
  const std::map<const char*, index_t> counts = {
      {"vocab-size", config.vocab_size},
      {"d-model", config.d_model},
      {"d-kv", config.d_kv},
      {"d-ff", config.d_ff},
      {"heads", config.num_heads},
      {"layers", config.num_layers},
      {"decoder-layers", config.num_decoder_layers},
      {"relative-attention-num-buckets", config.relative_attention_num_buckets},
      {"relative-attention-max-distance", config.relative_attention_max_distance}};
  for (const auto& [name, count] : counts) {
    if (count < 1) throw UserError("{} = {}; a positive whole number is needed", name, count);
    constexpr index_t kMost = index_t{1}
                              << 24;  // of a layer count as of a vocabulary: beyond, a slip of the finger
    if (count > kMost) throw UserError("{} = {}; at most {} is possible", name, count, kMost);
  }
  if (config.relative_attention_num_buckets % 4 != 0 ||
      config.relative_attention_max_distance <= config.relative_attention_num_buckets / 2) {
    throw UserError(
        "{} relative-position buckets up to distance {} cannot be laid out: the buckets must be a multiple "
        "of 4 and the distance greater than half of them (T5: 32 and 128)",
        config.relative_attention_num_buckets, config.relative_attention_max_distance);
  }
  if (!(config.dropout_rate >= 0 && config.dropout_rate < 1)) {
    throw UserError("dropout = {}; it must be at least 0 and less than 1", config.dropout_rate);
  }
  validate_groups("kv-groups", config.kv_groups, config.num_heads);
  validate_groups("encoder-kv-groups", config.encoder_kv_groups, config.num_heads);
  validate_sites(config);
}

std::string to_json(const ModelConfig& config) {
  const Activation activation = activation_of(config.feed_forward);
  nlohmann::ordered_json fields = {
      {"architectures", {"T5ForConditionalGeneration"}},
      {"model_type", "t5"},
      {"vocab_size", config.vocab_size},
      {"d_model", config.d_model},
      {"d_kv", config.d_kv},
      {"d_ff", config.d_ff},
      {"num_heads", config.num_heads},
      {"num_key_value_heads", config.kv_groups},
      {"encoder_num_key_value_heads", config.encoder_kv_groups},
      {"num_layers", config.num_layers},
      {"num_decoder_layers", config.num_decoder_layers},
      {"relative_attention_num_buckets", config.relative_attention_num_buckets},
      {"relative_attention_max_distance", config.relative_attention_max_distance},
      {"layer_norm_epsilon", config.layer_norm_epsilon},
      {"dropout_rate", config.dropout_rate},
      {"feed_forward_proj", activation.feed_forward_proj},
      {"dense_act_fn", activation.dense_act_fn},
      {"is_gated_act", activation.is_gated_act},
      {"is_encoder_decoder", true},
      {"tie_word_embeddings", config.tie_word_embeddings},
      {"scale_decoder_outputs", config.tie_word_embeddings},
      {"pad_token_id", 0},
      {"eos_token_id", 1},
      {"decoder_start_token_id", 0},
      {"initializer_factor", 1.0},
      {"use_cache", true}};
  if (config.uneven()) {
    auto& sites = fields["decoder_num_key_value_heads"];
    for (index_t layer = 0; layer < config.num_decoder_layers; ++layer) {
      sites["self"].push_back(config.self_groups(layer));
      sites["cross"].push_back(config.cross_groups(layer));
    }
  }
  return json_text(fields, 2) + "\n";
}

ModelConfig model_config_from_json(const std::string& text, const std::string& where) {
  const json object = parse_json_or_discard(text);
  if (!object.is_object()) throw UserError("{} is not a JSON object", where);
  const Fields fields(object, where);
  ModelConfig config;
  read_architecture(fields, config);
  config.vocab_size = fields.count("vocab_size");
  config.d_model = fields.count("d_model");
  config.d_kv = fields.count("d_kv");
  config.d_ff = fields.count("d_ff");
  config.num_heads = fields.count("num_heads");
  config.num_layers = fields.count("num_layers");
  config.num_decoder_layers = fields.count("num_decoder_layers", config.num_layers);
  config.kv_groups = fields.count("num_key_value_heads", config.num_heads);
  config.encoder_kv_groups = fields.count("encoder_num_key_value_heads", config.num_heads);
  config.site_kv_groups = site_groups_from(fields, config.num_decoder_layers);
  config.relative_attention_num_buckets = fields.count("relative_attention_num_buckets", 32);
  config.relative_attention_max_distance = fields.count("relative_attention_max_distance", 128);
  config.layer_norm_epsilon = fields.number("layer_norm_epsilon", 1e-6);
  config.dropout_rate = fields.number("dropout_rate", 0);
  try {
    validate(config);
  } catch (const UserError& error) {
    throw UserError("{}: {}", where, error.what());
  }
  if (!config.uneven()) config.site_kv_groups.clear();
  return config;
}

index_t parameter_count(const ModelConfig& config) {
  index_t count = 0;
  for (const ParameterSpec& spec : parameter_table(config)) {
    index_t size = 1;
    for (const index_t extent : spec.shape) size *= extent;
    count += size;
  }
  return count;
}

}  // namespace regroup
