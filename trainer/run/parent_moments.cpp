#include "trainer/run/parent_moments.h"

#include <set>

#include <fmt/ranges.h>

#include "kernels/base/json.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/conversion/regroup.h"
#include "trainer/formats/checkpoint_reader.h"

namespace regroup {
namespace {

// "shared.weight" of "shared.weight.second_moment_row".
std::string parameter_of(const std::string& slot) { return slot.substr(0, slot.rfind('.')); }

// The step at which the moments of a parent's parameter began: with it, if another program trained it.
index_t beginning_of(const CheckpointSource& parent, const std::string& parameter) {
  if (!parent.state) return 0;
  const auto own = parent.state->moment_offsets.find(parameter);
  return own == parent.state->moment_offsets.end() ? parent.state->first_step : own->second;
}

// UserError that lists what is missing or misshaped, before anything is read.
void require_slots(const CheckpointReader& reader, const std::vector<ShardedTensor>& slots) {
  std::vector<std::string> faults;
  for (const ShardedTensor& slot : slots) {
    const StoredTensor* const stored = reader.find(slot.name);
    if (stored == nullptr) {
      faults.push_back(fmt::format("{} is missing", slot.name));
    } else if (stored->shape != slot.shape) {
      faults.push_back(
          fmt::format("{}: {} instead of {}", slot.name, shape_text(stored->shape), shape_text(slot.shape)));
    }
  }
  if (faults.empty()) return;
  throw UserError(
      "{}: its moments are not those of this optimizer (--parent-moments off leaves them out): {}",
      reader.path().string(), fmt::join(faults, "; "));
}

}  // namespace

MomentOffsets inherited_moments(const ProcessGroup& world, const CheckpointSource& parent,
                                const ConversionPlan& plan, const std::string& optimizer) {
  if (parent.optimizer != optimizer) return {};
  MomentOffsets result;
  world.run_on(0, [&] {
    const std::set<std::string> changed = ConvertingReader::changed_parameters(plan);
    const CheckpointReader reader(parent.directory, "optimizer");
    for (const StoredTensor* slot : reader.tensors()) {
      const std::string parameter = parameter_of(slot->name);
      if (changed.contains(parameter)) continue;
      result[parameter] = beginning_of(parent, parameter);
    }
  });
  return parse_json(world.broadcast(json_text(nlohmann::json(result)))).get<MomentOffsets>();
}

void load_moments(const ProcessGroup& world, Backend& backend, const CheckpointSource& parent,
                  const MomentOffsets& inherited, std::span<const ShardedTensor> state) {
  std::vector<ShardedTensor> slots;
  for (const ShardedTensor& slot : state) {
    if (inherited.contains(parameter_of(slot.name))) slots.push_back(slot);
  }
  if (slots.empty()) return;
  world.run_together([&] {
    const CheckpointReader reader(parent.directory, "optimizer");
    require_slots(reader, slots);
    fill_from_host(backend, slots, [&](const ShardedTensor& slot) {
      world.heartbeat().beat("reading the parent's moments");
      reader.read(slot);
      if (slot.local.dtype == DType::kFloat32 && !all_finite(slot.local.as<float>(), slot.local.numel())) {
        throw UserError("{}: '{}' holds values that are not finite; --parent-moments off leaves them out",
                        parent.directory.string(), slot.name);
      }
    });
  });
}

}  // namespace regroup
