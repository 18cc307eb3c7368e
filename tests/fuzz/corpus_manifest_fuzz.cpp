// libFuzzer: whatever the bytes, parse_manifest() returns a manifest or throws UserError; and what it returns
// survives to_json().
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "data/corpus_manifest.h"
#include "kernels/base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const auto manifest = regroup::parse_manifest(text, "manifest.json");
    const auto json = regroup::to_json(manifest);
    regroup::check(regroup::to_json(regroup::parse_manifest(json, "manifest.json")) == json,
                   "to_json is no inverse");
  } catch (const regroup::UserError&) {
  }
  return 0;
}
