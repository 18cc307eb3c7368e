#include "trainer/run/run_state.h"

#include <cmath>
#include <limits>
#include <vector>

#include <fmt/ranges.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// JSON has no NaN.
nlohmann::json number_or_null(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
}

}  // namespace

nlohmann::json to_json(const RunState& state) {
  return {{"version", 1},
          {"step", state.step},
          {"samples", state.samples},
          {"first_step", state.first_step},
          {"parent", state.parent},
          {"parent_loss", number_or_null(state.parent_loss)},
          {"converted_loss", number_or_null(state.converted_loss)},
          {"recovered", number_or_null(state.recovered)},
          {"recovered_step", state.recovered_step},
          {"cpu_level", state.cpu_level},
          {"divergence", to_json(state.divergence)},
          {"conversion", state.conversion},
          {"moment_offsets", state.moment_offsets},
          {"identity", state.identity}};
}

RunState run_state_from_json(const nlohmann::json& json, const std::string& where) {
  try {
    const auto number = [&json](const char* name) {
      return json.at(name).is_null() ? std::numeric_limits<double>::quiet_NaN() : json.at(name).get<double>();
    };
    RunState state;
    state.step = json.at("step").get<index_t>();
    state.samples = json.at("samples").get<index_t>();
    state.first_step = json.at("first_step").get<index_t>();
    state.parent = json.at("parent").get<std::string>();
    state.parent_loss = number("parent_loss");
    state.converted_loss = number("converted_loss");
    if (json.contains("recovered")) {
      state.recovered = number("recovered");
      state.recovered_step = json.at("recovered_step").get<index_t>();
    }
    if (json.contains("divergence")) state.divergence = divergence_from_json(json.at("divergence"));
    state.cpu_level = json.value("cpu_level", std::string());
    state.conversion = json.value("conversion", nlohmann::json());
    state.moment_offsets = json.value("moment_offsets", MomentOffsets());
    state.identity = json.at("identity");
    return state;
  } catch (const nlohmann::json::exception& error) {
    throw UserError("{} is not the state of a run of this program: {}", where, error.what());
  }
}

void require_same_identity(const nlohmann::json& saved, const nlohmann::json& asked,
                           const std::string& where) {
  const nlohmann::json before = saved.flatten();
  const nlohmann::json now = asked.flatten();
  std::vector<std::string> differences;
  for (const auto& [pointer, value] : now.items()) {
    if (before.contains(pointer) && before.at(pointer) == value) continue;
    const std::string name = pointer.substr(pointer.rfind('/') + 1);
    differences.push_back(fmt::format("{} was {}, now {}", name,
                                      json_text(before.value(pointer, nlohmann::json(nullptr))),
                                      json_text(value)));
  }
  for (const auto& [pointer, value] : before.items()) {
    if (now.contains(pointer)) continue;
    const std::string name = pointer.substr(pointer.rfind('/') + 1);
    differences.push_back(fmt::format("{} was {}, now the default", name, json_text(value)));
  }
  if (differences.empty()) return;
  throw UserError("{} was made by another run: {}; give the old values to resume it, or another --run", where,
                  fmt::join(differences, "; "));
}

}  // namespace regroup
