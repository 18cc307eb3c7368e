#include "trainer/checkpoint/checkpoint_loader.h"

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/block_reader.h"
#include "trainer/checkpoint/block_scatter.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/formats/checkpoint_reader.h"

namespace regroup {
namespace {

constexpr const char* kLoading = "loading a checkpoint";
constexpr std::size_t kSlots = 4;  // blocks of a rank that are in use at once

// The tensor files of a step, as their headers say that they are. `usual`: as a save of these tensors writes
// them, so that bytes need but be put into place.
struct StoredStep {
  FilePlan files;
  std::uint64_t block_bytes = 0;
  bool usual = true;
};

// UserError where the headers make no sense, or do not list the tensors.
StoredStep read_headers(const std::filesystem::path& directory, const nlohmann::json& state,
                        const std::vector<TensorSet>& sets) {
  StoredStep step{.block_bytes = state.value("block_bytes", kChecksumBlock)};
  std::map<std::string, std::size_t> numbers;  // of files
  for (const auto& [name, entry] : state.at("files").items()) {
    if (!name.ends_with(".safetensors")) continue;
    numbers.emplace(name, step.files.files.size());
    step.files.files.push_back({.name = name, .bytes = entry.at("bytes").get<std::uint64_t>()});
  }
  std::size_t tensor = 0;
  for (const TensorSet& set : sets) {
    const CheckpointReader reader(directory, set.stem);
    reader.require(set.tensors);
    for (const ShardedTensor& destination : set.tensors) {
      const StoredTensor& stored = *reader.find(destination.name);
      const auto file = numbers.find(reader.file_of(destination.name).filename().string());
      const bool usual = file != numbers.end() && stored.type == stored_type(destination.local.dtype);
      if (usual) {
        step.files.files[file->second].tensors.push_back(
            {.tensor = tensor, .begin = stored.begin, .end = stored.end});
      }
      step.usual = step.usual && usual;
      ++tensor;
    }
  }
  for (PlannedFile& file : step.files.files) {
    std::sort(file.tensors.begin(), file.tensors.end(),
              [](const PlacedTensor& a, const PlacedTensor& b) { return a.begin < b.begin; });
  }
  constexpr std::uint64_t kElement = 8;  // bytes: blocks cut none
  if (step.block_bytes > kChecksumBlock || step.block_bytes % kElement != 0) step.usual = false;
  return step;
}

// Of everything that the ranks must agree on before they exchange bytes.
std::uint64_t fingerprint(const StoredStep& step) {
  std::string text = fmt::format("{} {}\n", step.usual, step.block_bytes);
  for (const PlannedFile& file : step.files.files) {
    text += fmt::format("{} {}\n", file.name, file.bytes);
    for (const PlacedTensor& t : file.tensors) text += fmt::format("{} {} {}\n", t.tensor, t.begin, t.end);
  }
  return checksum(std::as_bytes(std::span(text.data(), text.size())));
}

bool same_on_all(const ProcessGroup& world, std::uint64_t value) {
  const auto all = world.all_gather(std::vector{value});
  return std::all_of(all.begin(), all.end(), [&](const auto& other) { return other == all[0]; });
}

// Rank 0's, or the next one's that has any: each tensor-parallel group has read for itself.
std::optional<std::string> first_of(const ProcessGroup& world, const std::optional<std::string>& damage) {
  for (const std::string& found : world.all_gather(damage.value_or(""))) {
    if (!found.empty()) return found;
  }
  return std::nullopt;
}

std::optional<std::string> verify_and_read(const ProcessGroup& world, Backend& backend,
                                           const std::filesystem::path& directory,
                                           const std::vector<TensorSet>& sets) {
  if (auto damage = find_damage(world, directory)) return damage;
  world.run_together([&] {
    for (const TensorSet& set : sets) {
      const CheckpointReader reader(directory, set.stem);
      reader.require(set.tensors);
      fill_from_host(backend, set.tensors, [&](const ShardedTensor& tensor) {
        world.heartbeat().beat(kLoading);
        reader.read(tensor);
      });
    }
  });
  return std::nullopt;
}

std::optional<std::string> read_once(const ProcessGroup& world, const Layout& layout, Backend& backend,
                                     const std::filesystem::path& directory,
                                     const std::vector<TensorSet>& sets, const StoredStep& step,
                                     const nlohmann::json& state, std::span<std::byte> memory) {
  const int tp_size = layout.tensor_parallel;
  const ProcessGroup tp = world.split(world.rank() / tp_size, world.rank() % tp_size);
  std::vector<ShardedTensor> tensors = all_tensors(sets);
  std::vector<HeldTensor> held = gather_slices(tp, tensors);
  const std::vector<Block> blocks =
      plan_blocks(step.files, held, {.data_parallel = 1, .tensor_parallel = tp_size}, step.block_bytes);
  const auto of_reader =
      std::min<std::uint64_t>(memory.size(), BlockReader::memory_of(step.block_bytes, kSlots));
  BlockScatter scatter({.tp = tp,
                        .backend = backend,
                        .files = step.files,
                        .tensors = std::move(tensors),
                        .held = std::move(held),
                        .blocks = blocks,
                        .memory = memory.subspan(of_reader)},
                       kSlots);
  std::vector<std::vector<Block>> rounds;
  for (std::size_t round = 0; round < scatter.rounds(); ++round) rounds.push_back(scatter.mine(round));
  // What several groups read is best kept in the system's cache.
  const Caching caching = layout.data_parallel == 1 ? Caching::kPast : Caching::kThrough;
  std::optional<BlockReader> reader;
  world.run_together([&] {
    reader.emplace(directory, step.files, std::move(rounds), backend,
                   BlockReader::Options{.block_bytes = step.block_bytes,
                                        .slots = kSlots,
                                        .caching = caching,
                                        .memory = memory.first(of_reader)});
  });
  // Every rank takes part in every round, also where it cannot read: nobody waits for it.
  for (std::size_t round = 0; round < scatter.rounds(); ++round) {
    const std::byte* const bytes = reader->next([&] { world.heartbeat().beat(kLoading); });
    scatter.scatter(round, bytes, step.block_bytes);
  }
  world.run_together([&] { reader->rethrow(); });
  const auto checksums = file_checksums(step.files, blocks, tp.all_gather(reader->checksums()), tp_size);
  std::map<std::string, std::uint64_t> found;
  for (std::size_t f = 0; f < checksums.size(); ++f) found.emplace(step.files.files[f].name, checksums[f]);
  return first_of(world, compare_checksums(directory, state, found));
}

}  // namespace

std::optional<std::string> load_step(const ProcessGroup& world, const Layout& layout, Backend& backend,
                                     const std::filesystem::path& directory,
                                     const std::vector<TensorSet>& sets, std::span<std::byte> memory) {
  const nlohmann::json state = step_state(world, directory);
  StoredStep step;
  try {
    world.run_together([&] { step = read_headers(directory, state, sets); });
  } catch (const UserError&) {
    // Nothing is verified yet: it may be damage that speaks here.
    if (auto damage = find_damage(world, directory)) return damage;
    throw;
  }
  if (!same_on_all(world, fingerprint(step)) || !step.usual) {
    return verify_and_read(world, backend, directory, sets);
  }
  return read_once(world, layout, backend, directory, sets, step, state, memory);
}

}  // namespace regroup
