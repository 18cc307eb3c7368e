// The directory of a run, for the one job that writes to it.
#pragma once

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "kernels/base/file.h"
#include "kernels/base/log.h"
#include "trainer/checkpoint/step_directory.h"

namespace regroup {

// All members but stop_requested() and forget_start() are collective over the world; UserErrors are the same
// on every rank.
class RunDirectory {
 public:
  // Creates nothing: what is refused leaves no trace.
  RunDirectory(const ProcessGroup& world, std::filesystem::path path, const Log& log);

  const std::filesystem::path& path() const { return path_; }
  const CheckpointStore& checkpoints() const { return checkpoints_; }

  // The newest step, none where the run has not saved yet. UserError where all that it saved was set aside as
  // damaged: to begin anew is for a person to decide.
  std::optional<index_t> newest() const;
  // Takes the directory and renames a damaged step, saying why, so that newest() is an older one.
  void set_aside(index_t step, const std::string& damage);

  // Creates the directory, locks it for this job until the end, and tidies up what a killed job left.
  // UserError where another job holds it: at once where that is on this host, else after three minutes, for
  // so long may a file system take to notice that a machine is gone. A second call does nothing.
  void take();

  // Notes in starts.json that a job begins to train at `step`. False where `budget` (0: none) starts at this
  // very step have been noted before: something ends every job before it saves.
  bool count_start(index_t step, index_t budget);
  // Takes back the note of the last count_start(): a person mends what ended this start. Any rank, alone.
  void forget_start() const noexcept;

  // Rank 0, at any time: whether the file `stop` is there. Looks at most once a second.
  bool stop_requested();
  // Removes it: the request is granted. Whether it was there.
  bool clear_stop_request() const;

 private:
  void lock();

  const ProcessGroup& world_;
  std::filesystem::path path_;
  const Log& log_;
  CheckpointStore checkpoints_;
  std::optional<FileLock> lock_;  // rank 0
  bool taken_ = false;
  index_t counted_step_ = 0, earlier_starts_ = 0;  // of the last count_start()
  std::chrono::steady_clock::time_point next_look_;
};

}  // namespace regroup
