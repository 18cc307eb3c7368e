#include "trainer/formats/bounded_json.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {

using nlohmann::json;

json parse_bounded(std::string_view text, std::string_view where, const NoteKey& note_key) {
  constexpr int kDeepest = 32;
  const auto check_event = [&](int depth, json::parse_event_t event, const json& value) {
    const bool opens =
        event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
    if (opens && depth >= kDeepest) {
      throw UserError("{}: its lists and objects are nested deeper than {}", where, kDeepest);
    }
    if (note_key && event == json::parse_event_t::key) note_key(depth, value.get<std::string>());
    return true;
  };
  return json::parse(text, check_event, /*allow_exceptions=*/false);
}

std::string shown(const json& value) {
  // A value that was not parsed here may be of any depth: only what is flat is printed.
  const bool nested =
      std::any_of(value.begin(), value.end(), [](const json& inner) { return inner.is_structured(); });
  if (nested) return value.is_array() ? "a nested list" : "a nested object";
  return printable(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

}  // namespace regroup
