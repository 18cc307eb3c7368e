// libFuzzer: whatever a .zarray says and its chunk holds, it is an array that is possible and bytes that fill
// the chunk, or refused with a UserError of one line. The input: the text of a .zarray, a line feed, the
// bytes of a chunk.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/formats/bounded_json.h"
#include "trainer/formats/zarr.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::size_t cut = std::min(text.find('\n'), size);
  try {
    const auto fields = regroup::parse_bounded(text.substr(0, cut), "fuzzed");
    const regroup::ZarrMetadata metadata = regroup::zarr_metadata(fields, "fuzzed");
    regroup::check(regroup::stored_bytes(metadata.type, metadata.shape).has_value(), "an impossible array");
    constexpr std::uint64_t kMost = 1 << 16;
    std::vector<std::byte> chunk(std::min(kMost, *regroup::stored_bytes(metadata.type, metadata.chunks)));
    const auto bytes = std::as_bytes(std::span(data, size)).subspan(std::min(cut + 1, size));
    regroup::decompress(regroup::source_of(bytes), chunk, "fuzzed/0.0");
  } catch (const regroup::UserError& error) {
    regroup::check(std::string(error.what()).size() < 1000, "a long message");
  }
  return 0;
}
