// The trial of a run directory by all ranks, for --doctor.
#pragma once

#include <filesystem>
#include <string>

#include "parallel/process_group.h"
#include "trainer/commands/doctor_facts.h"

namespace regroup {

struct DirectoryTrial {
  std::string error;     // why rank 0 cannot use the directory, the same on every rank; "": it can
  DirectoryFacts facts;  // of this rank
};

// Writes files of a few kinds into a folder of its own in `run`, as a run would: does every rank see them,
// how fast do all write at once, do locks hold. Leaves nothing behind: what it made, a missing `run`
// included, is removed. Throws nothing for a directory that is unfit. Collective.
DirectoryTrial try_directory(const ProcessGroup& world, const std::filesystem::path& run);

}  // namespace regroup
