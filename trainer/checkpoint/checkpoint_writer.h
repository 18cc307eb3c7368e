// Saves a run's tensors, behind its back: a save holds the run up only while the tensors are copied.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/json.h"
#include "trainer/checkpoint/background_job.h"
#include "trainer/checkpoint/block_gather.h"
#include "trainer/checkpoint/step_directory.h"

namespace regroup {

// A save has three phases. Staging, collective: rank 0 makes the directory and the files, and the blocks of
// each rank are copied, and exchanged within tensor-parallel groups, into memory reserved at the start.
// Writing: every rank writes its blocks and takes their checksums, on a thread that calls no MPI. Committing:
// rank 0, on that thread, writes trainer.json, flushes and renames, and removes old steps. Between the phases
// the ranks agree: the run calls advance() on all of them once none of them is busy any more, which it learns
// by a sum that it takes anyway.
//
// Where the memory is smaller than a rank's share, all but the last of it is written before save() returns.
class CheckpointWriter {
 public:
  struct Options {
    std::uint64_t memory = 0;  // the most bytes of a rank for staging; 0: its share of a checkpoint
    index_t keep_last = 1;     // see CheckpointStore::prune()
    index_t keep_every = 0;
    std::uint64_t block_bytes = kChecksumBlock;  // others are for tests
    FileOptions files;
  };

  // `sets`: this rank's slices, wherever `backend` has them, at the same places in every save. Rank r of
  // `world` has the coordinates that Mesh gives it. Reserves and touches the staging memory. Collective;
  // InternalError as gather_slices(). `backend` outlives it.
  CheckpointWriter(const ProcessGroup& world, const Layout& layout, Backend& backend, CheckpointStore store,
                   const std::vector<TensorSet>& sets, const Options& options);
  // Does not commit what is under way.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Begins to save the tensors as they are now, `state` (see PendingStep::commit) and small files {name:
  // text} (rank 0's count). Nothing may be pending. Returns when the tensors may change. Collective.
  // UserError or SystemError on every rank where the disk refuses:   // the step then does not exist (it may
  // where the last flush of a directory was refused), and earlier ones are intact.
  void save(index_t step, nlohmann::json state, const std::map<std::string, std::string>& texts);

  // Whether a save is under way. The same on every rank.
  bool pending() const { return phase_ != Phase::kIdle; }
  // Whether this rank still works on it, or has failed at it.
  bool busy() const { return job_.busy(); }
  bool failed() const { return job_.failed(); }
  // Collective: ends the phase under way, waiting for this rank's work where it is not done, and begins the
  // next. Errors as save(). What was saved, if that was the last phase.
  // `give_up`: a rank has failed, the others need not finish.
  std::optional<index_t> advance(bool give_up = false);
  // Collective: until nothing is pending. What was saved, if anything was.
  std::optional<index_t> finish();

  std::uint64_t checkpoint_bytes() const { return files_.bytes(); }  // of all ranks
  // Host memory that this rank keeps for saving.
  index_t staging_bytes() const { return staging_.own_bytes() + gather_->bytes(); }
  // The largest part of it, for others to use until the next save(). Nothing may be pending.
  std::span<std::byte> idle_memory() const;
  // Rank 0: what went wrong without harm to what was saved last (an old step cannot be removed); "" if
  // nothing.
  const std::string& complaint() const { return complaint_; }

 private:
  enum class Phase { kIdle, kWriting, kCommitting };

  void begin(index_t step, const std::map<std::string, std::string>& texts);
  void write(std::size_t round);
  void sync();
  void wait();
  void commit(const std::map<std::string, FileRecord>& files);
  std::map<std::string, FileRecord> records();

  ProcessGroup world_;
  CheckpointStore store_;
  Options options_;
  FilePlan files_;
  std::vector<Block> blocks_;  // of all ranks
  std::unique_ptr<BlockGather> gather_;
  BlockMemory staging_;

  Phase phase_ = Phase::kIdle;
  index_t step_ = 0;
  nlohmann::json state_;
  std::optional<PendingStep> pending_;                 // rank 0
  std::vector<std::optional<SharedOutputFile>> open_;  // by file
  std::vector<std::uint64_t> checksums_;               // of this rank's blocks, by slot
  std::string complaint_;
  std::atomic<bool> cancelled_ = false;
  std::atomic<std::uint64_t> written_ = 0;  // blocks and files done
  BackgroundJob job_;                       // last: its thread uses the others
};

}  // namespace regroup
