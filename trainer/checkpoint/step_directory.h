// The checkpoints of a run: run/checkpoints/step-00012000/. A directory of such a name is complete: it is
// filled under another name (.partial), flushed to the disk, and renamed; it is removed by renaming it
// (.deleting) first. A process may be killed at any moment. One that does not match its checksums is set
// aside
// (.damaged).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/dtype.h"
#include "parallel/process_group.h"

namespace regroup {

// Checksums are XXH3 of the XXH3s (little-endian) of a file's blocks of this many bytes, so that many ranks
// can share a file's bytes, writing or reading.
inline constexpr std::uint64_t kChecksumBlock = std::uint64_t{4} << 20;

struct FileRecord {
  std::uint64_t bytes = 0;
  std::uint64_t checksum = 0;
};

// A step directory that is being filled, by the one process that has this object, or by others beside it.
// Without commit(), also where an exception passes, the destructor removes it. Move-only.
class PendingStep {
 public:
  ~PendingStep();
  PendingStep(PendingStep&& other) noexcept;
  PendingStep& operator=(PendingStep&&) = delete;
  PendingStep(const PendingStep&) = delete;
  PendingStep& operator=(const PendingStep&) = delete;

  // Where the files go: run/checkpoints/step-00012000.partial.
  const std::filesystem::path& path() const { return path_; }
  // Writes a small file (config.json).
  void write_text(const std::string& name, std::string_view text);
  // Adds {"files": {name: {"bytes", "checksum"}}, "block_bytes", "checksum"} to `state` (an object: step,
  // samples, seed, options, versions), writes it as trainer.json, flushes the directory, renames it to its
  // final name, and then points `latest` to it. `files`: what others have written, and brought to the disk;
  // those of write_text() are known. UserError where the disk refuses; the step then does not exist.
  void commit(nlohmann::json state, std::map<std::string, FileRecord> files = {},
              std::uint64_t block_bytes = kChecksumBlock);

 private:
  friend class CheckpointStore;
  PendingStep(std::filesystem::path path, std::filesystem::path final_path);

  std::filesystem::path path_;  // empty: committed or moved away
  std::filesystem::path final_path_;
  std::map<std::string, std::string> texts_;
};

// The members that say so are collective over the group and give every rank the same: rank 0 looks at the
// file system, and every failure is the same error on every rank. The others are for rank 0 alone, on any
// thread.
class CheckpointStore {
 public:
  // Uses run_directory/checkpoints. Creates nothing: a run that only reads may have no write access.
  CheckpointStore(ProcessGroup group, std::filesystem::path run_directory);

  // Collective. Creates the directory and removes what a killed process left there (.partial, .deleting).
  // Call once before the first create(), in the one job that writes to the run.
  void prepare() const;

  // Collective. Complete steps, ascending.
  std::vector<index_t> steps() const;
  std::optional<index_t> latest() const;
  // Collective. The names of steps that were set aside.
  std::vector<std::string> damaged() const;
  std::filesystem::path path_of(index_t step) const;          // .../step-00012000
  std::filesystem::path partial_path_of(index_t step) const;  // .../step-00012000.partial
  const std::filesystem::path& directory() const { return directory_; }

  // Rank 0. An empty directory for this step's files. UserError where the step exists already.
  PendingStep create(index_t step) const;
  // Rank 0. Removes steps but the newest max(keep_last, 1) and, where keep_every > 0, the multiples of
  // keep_every.
  void prune(index_t keep_last, index_t keep_every) const;

  // Collective. Renames the step to step-00012000.damaged, where a person can look at it and no run will.
  void set_aside(index_t step) const;

 private:
  ProcessGroup group_;
  std::filesystem::path directory_;
};

// What a step directory's trainer.json says, wherever the directory lies. Collective; the same UserError on
// every rank.
nlohmann::json step_state(const ProcessGroup& group, const std::filesystem::path& directory);

// kSmall: every file's size, and the bytes of all but the tensors.
enum class Verification { kSmall, kAll };
// Compares a step's files with its trainer.json, the ranks sharing the reading: which file is missing,
// shortened or changed, if any is. Collective; the same on every rank. An error where a file is there and
// cannot be read.
std::optional<std::string> find_damage(const ProcessGroup& group, const std::filesystem::path& directory,
                                       Verification extent = Verification::kAll);
// What find_damage() says where the checksum of one of these files (by name) is not that of `state`, which is
// the step's trainer.json; nothing where all are.
std::optional<std::string> compare_checksums(const std::filesystem::path& directory,
                                             const nlohmann::json& state,
                                             const std::map<std::string, std::uint64_t>& found);
// UserError where find_damage() finds some.
void verify_step(const ProcessGroup& group, const std::filesystem::path& directory,
                 Verification extent = Verification::kAll);

// The checksums of several files at once. Collective: blocks are dealt to the ranks in turn; every rank gets
// all the results.
std::vector<std::uint64_t> tree_checksums(const ProcessGroup& group,
                                          const std::vector<std::filesystem::path>& files,
                                          std::uint64_t block_bytes = kChecksumBlock);

}  // namespace regroup
