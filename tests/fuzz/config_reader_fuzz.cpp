// libFuzzer: whatever the bytes, parse_config() returns lines or throws UserError; and what it returns,
// written out again, reads as the same.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "trainer/options.h"

namespace {

std::string rendered(const std::vector<regroup::ConfigLine>& lines) {
  std::string text, section;
  for (const auto& line : lines) {
    if (line.section != section) text += fmt::format("[{}]\n", line.section);
    section = line.section;
    text += fmt::format("{} = {}\n", line.key, line.value);
  }
  return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const std::string once = rendered(regroup::parse_config(text, "fuzz.cfg"));
    regroup::check(rendered(regroup::parse_config(once, "again.cfg")) == once, "config lines do not survive");
  } catch (const regroup::UserError&) {
  }
  return 0;
}
