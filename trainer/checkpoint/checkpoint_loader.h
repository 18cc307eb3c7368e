// Loads a checkpoint of this program into a run's tensors, and verifies it, in one pass over its files.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "parallel/mesh.h"
#include "trainer/formats/file_plan.h"

namespace regroup {

// Fills `sets`, this rank's slices in memory of `backend`, from a step directory whose trainer.json and
// files' sizes are verified already (find_damage, Verification::kSmall), and compares every byte of its
// tensor files with their checksums: what find_damage() would say of them, if it would say anything. The
// tensors then hold anything. Rank r of `world` has the coordinates that Mesh gives it.
//
// Within a tensor-parallel group each block of a file is read by one rank, which takes its checksum, and sent
// to those that hold some of it (block_scatter.h); every group reads for itself. A rank needs some 64 MiB
// of host memory: of `memory`, which is anybody's (CheckpointWriter::idle_memory()), or its own where that is
// too small. Where a file is not as a save of such tensors writes it (other element types), it is verified
// first and then read.
//
// Collective over the world, the same on every rank. UserError, on every rank, where the files are intact and
// do not hold these tensors (CheckpointReader::require()).
std::optional<std::string> load_step(const ProcessGroup& world, const Layout& layout, Backend& backend,
                                     const std::filesystem::path& directory,
                                     const std::vector<TensorSet>& sets, std::span<std::byte> memory = {});

}  // namespace regroup
