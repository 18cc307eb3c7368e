// <nlohmann/json.hpp>, and the reading and writing of texts compiled once, in json.cpp: json::parse() and
// dump() cost a compiler many seconds in each file that calls them. Headers that only name values include
// <nlohmann/json_fwd.hpp>.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace regroup {

// The value of a text; nlohmann::json::parse_error where it is no JSON.
nlohmann::json parse_json(std::string_view text);
nlohmann::ordered_json parse_ordered_json(std::string_view text);

// The value of a text; a discarded one where it is no JSON.
nlohmann::json parse_json_or_discard(std::string_view text);

// Gives `events` what a text holds, piece by piece. False where one of them returned false, as for an error.
bool read_json(std::string_view text, nlohmann::json_sax<nlohmann::json>& events);

// A value as text: on one line, or on several with an indent. nlohmann::json::type_error where a string is
// not UTF-8.
std::string json_text(const nlohmann::json& value, int indent = -1);
std::string json_text(const nlohmann::ordered_json& value, int indent = -1);

// The same with U+FFFD for what is not UTF-8.
std::string json_text_of_any_bytes(const nlohmann::json& value, int indent = -1);
std::string json_text_of_any_bytes(const nlohmann::ordered_json& value, int indent = -1);

}  // namespace regroup
