#include "trainer/run/parent_moments.h"

#include <set>

#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/conversion/regroup.h"

namespace regroup {
namespace {

// "shared.weight" of "shared.weight.second_moment_row".
std::string parameter_of(const std::string& slot) { return slot.substr(0, slot.rfind('.')); }

}  // namespace

MomentOffsets inherited_moments(const ProcessGroup& world, const CheckpointSource& parent,
                                const ConversionPlan& plan, const std::string& optimizer) {
  if (!parent.state || parent.state->identity.value("optimizer", "") != optimizer) return {};
  MomentOffsets result;
  world.run_on(0, [&] {
    if (!CheckpointReader::exists(parent.directory, "optimizer")) return;
    const std::set<std::string> changed = ConvertingReader::changed_parameters(plan);
    const CheckpointReader reader(parent.directory, "optimizer");
    for (const StoredTensor* slot : reader.tensors()) {
      const std::string parameter = parameter_of(slot->name);
      if (changed.contains(parameter)) continue;
      const auto own = parent.state->moment_offsets.find(parameter);
      result[parameter] = own == parent.state->moment_offsets.end() ? parent.state->first_step : own->second;
    }
  });
  return nlohmann::json::parse(world.broadcast(nlohmann::json(result).dump())).get<MomentOffsets>();
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
    fill_from_host(backend, slots, [&](const ShardedTensor& slot) {
      world.heartbeat().beat("reading the parent's moments");
      reader.read(slot);
    });
  });
}

}  // namespace regroup
