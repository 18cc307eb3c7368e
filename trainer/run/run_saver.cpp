#include "trainer/run/run_saver.h"

#include <chrono>
#include <utility>

namespace regroup {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::uint64_t staging_limit(const Options& options) {
  constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
  constexpr std::uint64_t kEnoughWhileTrainingWaits = 64 * kMiB;
  const bool small = options.save_memory == 0 && !options.background_save;
  return small ? kEnoughWhileTrainingWaits : static_cast<std::uint64_t>(options.save_memory) * kMiB;
}

}  // namespace

RunSaver::RunSaver(const ProcessGroup& world, const Layout& layout, Backend& backend,
                   const CheckpointStore& store, const std::vector<TensorSet>& sets, const Options& options,
                   std::function<void(const SavedStep&)> saved)
    : writer_(world, layout, backend, store, sets,
              {.memory = staging_limit(options),
               .keep_last = options.keep_last,
               .keep_every = options.keep_every}),
      background_(options.background_save),
      saved_(std::move(saved)) {}

template <class Work>
void RunSaver::wait_for(Work&& work) {
  const double began = seconds_now();
  work();
  waited_ += seconds_now() - began;
  tell();
}

void RunSaver::tell() {
  const std::optional<index_t> step = std::exchange(done_, std::nullopt);
  if (!step) return;
  saved_({.step = *step,
          .gigabytes = static_cast<double>(writer_.checkpoint_bytes()) * 1e-9,
          .seconds = seconds_now() - began_,
          .waited = waited_,
          .complaint = writer_.complaint()});
}

void RunSaver::save(index_t step, nlohmann::json state, const std::map<std::string, std::string>& texts) {
  finish();
  began_ = seconds_now();
  waited_ = 0;
  wait_for([&] {
    writer_.save(step, std::move(state), texts);
    if (!background_) done_ = writer_.finish();
  });
}

void RunSaver::finish() {
  if (!writer_.pending()) return;
  wait_for([this] { done_ = writer_.finish(); });
}

void RunSaver::proceed(bool failed) {
  if (!writer_.pending()) return;
  wait_for([this, failed] { done_ = writer_.advance(failed); });
}

double RunSaver::staging_gigabytes() const { return static_cast<double>(writer_.staging_bytes()) * 1e-9; }

}  // namespace regroup
