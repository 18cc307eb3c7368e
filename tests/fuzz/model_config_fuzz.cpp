// libFuzzer: whatever the bytes of a config.json, it is a model that is possible, and written out again reads
// as the same, or it is refused with a UserError of one line.
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/base/error.h"
#include "trainer/model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const regroup::ModelConfig config = regroup::model_config_from_json(text, "config.json");
    const bool one_each =
        config.site_kv_groups.empty() ||
        static_cast<regroup::index_t>(config.site_kv_groups.size()) == 2 * config.num_decoder_layers;
    regroup::check(one_each, "not a number of groups for each attention");
    regroup::check(regroup::model_config_from_json(regroup::to_json(config), "again.json") == config,
                   "a model does not survive");
  } catch (const regroup::UserError& error) {
    regroup::check(std::string(error.what()).size() < 1000, "a long message");
  }
  return 0;
}
