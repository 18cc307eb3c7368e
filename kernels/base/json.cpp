#include "kernels/base/json.h"

namespace regroup {

using nlohmann::json;
using nlohmann::ordered_json;

json parse_json(std::string_view text) { return json::parse(text); }

ordered_json parse_ordered_json(std::string_view text) { return ordered_json::parse(text); }

json parse_json_or_discard(std::string_view text) {
  return json::parse(text, nullptr, /*allow_exceptions=*/false);
}

bool read_json(std::string_view text, nlohmann::json_sax<json>& events) {
  return json::sax_parse(text, &events);
}

std::string json_text(const json& value, int indent) { return value.dump(indent); }

std::string json_text(const ordered_json& value, int indent) { return value.dump(indent); }

std::string json_text_of_any_bytes(const json& value, int indent) {
  return value.dump(indent, ' ', false, json::error_handler_t::replace);
}

std::string json_text_of_any_bytes(const ordered_json& value, int indent) {
  return value.dump(indent, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace regroup
