// A run's saves: when training waits for one, and what is told of it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "trainer/checkpoint/checkpoint_writer.h"
#include "trainer/options.h"

namespace regroup {

struct SavedStep {
  index_t step = 0;
  double gigabytes = 0;   // of all ranks
  double seconds = 0;     // from its beginning to its end
  double waited = 0;      // of these, how long training stood still
  std::string complaint;  // rank 0: see CheckpointWriter::complaint()
};

// Collective over the world, but for busy() and failed().
class RunSaver {
 public:
  // As --background-save, --save-memory, --keep-last and --keep-every ask; `saved` is called on every rank
  // when a step is complete. See CheckpointWriter for the others.
  RunSaver(const ProcessGroup& world, const Layout& layout, Backend& backend, const CheckpointStore& store,
           const std::vector<TensorSet>& sets, const Options& options,
           std::function<void(const SavedStep&)> saved);

  // Waits for the last save, and begins, or does, this one.
  void save(index_t step, nlohmann::json state, const std::map<std::string, std::string>& texts);
  // Waits for the save under way, if there is one.
  void finish();

  // Of this rank's part of the save under way; for the sum of every step.   // Where no rank is busy, or one
  // has failed, proceed(whether one has) is called.
  bool busy() const { return writer_.busy(); }
  bool failed() const { return writer_.failed(); }
  void proceed(bool failed);

  double staging_gigabytes() const;
  // See CheckpointWriter.
  std::span<std::byte> idle_memory() const { return writer_.idle_memory(); }

 private:
  template <class Work>
  void wait_for(Work&& work);
  void tell();

  CheckpointWriter writer_;
  bool background_;
  std::function<void(const SavedStep&)> saved_;
  double began_ = 0, waited_ = 0;  // of the save under way
  std::optional<index_t> done_;
};

}  // namespace regroup
