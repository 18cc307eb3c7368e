// JSON texts that come with a checkpoint. nlohmann's parser takes any depth; what copies, compares or prints
// a value afterwards recurses, and a text of "[[[[..." would overflow the stack.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace regroup {

// Called with every key of an object and how deep it is: 1 in the root.
using NoteKey = std::function<void(int depth, const std::string& key)>;

// The value of a text, or a discarded one where that is no JSON. UserError "<where>: ..." where lists and
// objects are nested deeper than 32.
nlohmann::json parse_bounded(std::string_view text, std::string_view where, const NoteKey& note_key = {});

// A value as an error shows it, on one short line.
std::string shown(const nlohmann::json& value);

}  // namespace regroup
