// The checkpoints of a run: run/checkpoints/step-00012000/. A directory of such a name is complete: it is
// filled under another name (.partial), checksummed, flushed to the disk, and renamed; it is removed by
// renaming it (.deleting) first. A process may be killed at any moment.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "kernels/dtype.h"
#include "parallel/process_group.h"

namespace regroup {

class CheckpointStore;

// A step directory that is being filled. Without commit(), also where an exception passes, the destructor
// removes it. Move-only.
class PendingStep {
 public:
  ~PendingStep();
  PendingStep(PendingStep&& other) noexcept;
  PendingStep& operator=(PendingStep&&) = delete;
  PendingStep(const PendingStep&) = delete;
  PendingStep& operator=(const PendingStep&) = delete;

  // Where the files go: run/checkpoints/step-00012000.partial.
  const std::filesystem::path& path() const { return path_; }
  // Collective; rank 0 writes a small file (config.json), or copies one (tokenizer.model).
  void write_text(const std::string& name, std::string_view text) const;
  void copy_file(const std::string& name, const std::filesystem::path& source) const;
  // Collective: reads every file back to checksum it (the ranks share the bytes), adds {"files": {name:
  // {"bytes", "checksum"}}, "checksum"} to `state` (an object: step, samples, seed, options, versions),
  // writes it as trainer.json, flushes, renames to the final name, and then writes `latest`. UserError on
  // every rank where the disk refuses; the step then does not exist.
  void commit(nlohmann::json state);

 private:
  friend class CheckpointStore;
  PendingStep(ProcessGroup group, std::filesystem::path path, std::filesystem::path final_path);

  ProcessGroup group_;
  std::filesystem::path path_;  // empty: committed or moved away
  std::filesystem::path final_path_;
};

// All members but path_of() are collective over the group and give every rank the same; rank 0 looks at the
// file system. Every failure is the same error on every rank.
class CheckpointStore {
 public:
  // Uses run_directory/checkpoints. Creates nothing: a run that only reads may have no write access.
  CheckpointStore(ProcessGroup group, std::filesystem::path run_directory);

  // Creates the directory and removes what a killed process left there (.partial, .deleting). Call once
  // before the first begin(), in the one job that writes to the run.
  void prepare() const;

  // Complete steps, ascending.
  std::vector<index_t> steps() const;
  std::optional<index_t> latest() const;
  std::filesystem::path path_of(index_t step) const;  // .../step-00012000

  // An empty directory for this step's files. UserError where the step exists already.
  PendingStep begin(index_t step) const;

  // What commit() was given (and "files", "checksum"). UserError naming trainer.json where it is missing or
  // damaged.
  nlohmann::json state(index_t step) const;
  // Reads every byte of the step, the ranks sharing the work, and compares checksums. UserError naming the
  // first damaged, shortened or missing file.
  void verify(index_t step) const;

  // Removes steps but the newest max(keep_last, 1) and, where keep_every > 0, the multiples of keep_every.
  void prune(index_t keep_last, index_t keep_every) const;

 private:
  ProcessGroup group_;
  std::filesystem::path directory_;
};

// What a step directory's trainer.json says, wherever the directory lies; and the comparison of its files
// with it. Collective; the same UserError on every rank. CheckpointStore's members of the same name are
// these.
nlohmann::json step_state(const ProcessGroup& group, const std::filesystem::path& directory);
// kSmall: every file's size, and the bytes of all but the tensors.
enum class Verification { kSmall, kAll };
void verify_step(const ProcessGroup& group, const std::filesystem::path& directory,
                 Verification extent = Verification::kAll);

// XXH3 of the XXH3s (little-endian) of the file's 4 MiB blocks, of several files at once. Collective: blocks
// are dealt to the ranks in turn; every rank gets all the results.
std::vector<std::uint64_t> tree_checksums(const ProcessGroup& group,
                                          const std::vector<std::filesystem::path>& files);

}  // namespace regroup
