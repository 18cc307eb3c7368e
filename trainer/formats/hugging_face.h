// The small files of a model directory in transformers' layout.
#pragma once

#include <map>
#include <string>

#include "trainer/formats/stored_tensor.h"
#include "trainer/model/config.h"

namespace regroup {

// {name: text} of what lies beside the weights, which are stored as `type`.
//
// Compact: config.json with the number of key/value heads of each attention, and modeling_regroup_t5.py, the
// model that reads it (config.json's "auto_map" names it: from_pretrained(..., trust_remote_code=True)).
std::map<std::string, std::string> compact_model_files(const ModelConfig& config, StoredType type);
// Expanded: config.json of a stock T5ForConditionalGeneration. InternalError where some attention has fewer
// key/value groups than heads.
std::map<std::string, std::string> stock_model_files(const ModelConfig& config, StoredType type);

// generation_config.json of a T5: decoding starts with padding and ends with eos.
std::string generation_config_text();
// tokenizer_config.json for a SentencePiece model (spiece.model) with T5's 100 sentinels, which it holds as
// pieces or which the tokenizer has to add.
std::string tokenizer_config_text(bool holds_sentinels);

}  // namespace regroup
