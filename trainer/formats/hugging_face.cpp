#include "trainer/formats/hugging_face.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/formats/model_code.h"

namespace regroup {
namespace {

using nlohmann::ordered_json;

ordered_json config_of(const ModelConfig& config, StoredType type) {
  ordered_json fields = parse_ordered_json(to_json(config));
  const char* const name = type == StoredType::kBF16  ? "bfloat16"
                           : type == StoredType::kF16 ? "float16"
                                                      : "float32";
  fields["torch_dtype"] = name;
  fields["dtype"] = name;  // since transformers 5
  return fields;
}

}  // namespace

std::map<std::string, std::string> compact_model_files(const ModelConfig& config, StoredType type) {
  ordered_json fields = config_of(config, type);
  fields["architectures"] = {"RegroupT5ForConditionalGeneration"};
  fields["model_type"] = "regroup_t5";
  fields["auto_map"] = {{"AutoConfig", "modeling_regroup_t5.RegroupT5Config"},
                        {"AutoModelForSeq2SeqLM", "modeling_regroup_t5.RegroupT5ForConditionalGeneration"}};
  return {{"config.json", json_text(fields, 2) + "\n"}, {"modeling_regroup_t5.py", std::string(kModelCode)}};
}

std::map<std::string, std::string> stock_model_files(const ModelConfig& config, StoredType type) {
  const std::vector<index_t> groups = config.all_kv_groups();
  check(std::all_of(groups.begin(), groups.end(), [&](index_t g) { return g == config.num_heads; }),
        "a model with grouped queries is no stock T5");
  ordered_json fields = config_of(config, type);
  fields.erase("num_key_value_heads");
  fields.erase("encoder_num_key_value_heads");
  return {{"config.json", json_text(fields, 2) + "\n"}};
}

std::string generation_config_text() {
  const ordered_json fields = {{"decoder_start_token_id", 0}, {"eos_token_id", 1}, {"pad_token_id", 0}};
  return json_text(fields, 2) + "\n";
}

std::string tokenizer_config_text(bool holds_sentinels) {
  constexpr int kSentinels = 100;
  ordered_json fields = {{"tokenizer_class", "T5Tokenizer"},
                         {"extra_ids", holds_sentinels ? 0 : kSentinels},
                         {"eos_token", "</s>"},
                         {"pad_token", "<pad>"},
                         {"unk_token", "<unk>"},
                         {"model_max_length", 512}};
  for (int i = 0; i < kSentinels; ++i) {
    fields["additional_special_tokens"].push_back(fmt::format("<extra_id_{}>", i));
  }
  return json_text(fields, 2) + "\n";
}

}  // namespace regroup
