#include "trainer/run/run_directory.h"

#include <thread>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "kernels/base/host.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

constexpr const char* kStopFile = "stop";
constexpr const char* kStartsFile = "starts.json";

// How many starts at `step` the file tells of; none where it tells of another step, or of nothing.
index_t noted_starts(const std::filesystem::path& file, index_t step) {
  if (!std::filesystem::exists(file)) return 0;
  const auto json = parse_json_or_discard(read_text(file, 1 << 16));
  if (!json.is_object() || !json.contains("starts") || !json["starts"].is_number_integer()) return 0;
  return json.value("step", nlohmann::json()) == step ? json["starts"].get<index_t>() : 0;
}

void note_starts(const std::filesystem::path& file, index_t step, index_t starts) {
  const nlohmann::json noted = {{"step", step}, {"starts", starts}};
  write_text(file, json_text(noted) + "\n");
}

}  // namespace

RunDirectory::RunDirectory(const ProcessGroup& world, std::filesystem::path path, const Log& log)
    : world_(world), path_(std::move(path)), log_(log), checkpoints_(world, path_) {}

std::optional<index_t> RunDirectory::newest() const {
  const std::optional<index_t> step = checkpoints_.latest();
  if (step) return step;
  const std::vector<std::string> damaged = checkpoints_.damaged();
  if (damaged.empty()) return std::nullopt;
  UserError error(
      "no intact checkpoint is left in {}: {} was set aside. Restore one (without .damaged in its name), or "
      "remove it to begin the run anew",
      checkpoints_.directory().string(), fmt::join(damaged, ", "));
  error.set_on_every_rank();
  throw error;
}

void RunDirectory::set_aside(index_t step, const std::string& damage) {
  take();
  if (world_.rank() == 0) {
    log_.warning("{}; step {} is set aside as {}.damaged", damage, step,
                 checkpoints_.path_of(step).filename().string());
  }
  checkpoints_.set_aside(step);
}

void RunDirectory::take() {
  if (std::exchange(taken_, true)) return;
  world_.run_on(0, [&] {
    regroup::create_directories(path_ / "tensorboard");
    lock();
  });
  checkpoints_.prepare();
}

void RunDirectory::lock() {
  constexpr int kPatience = 180;  // seconds
  const std::filesystem::path file = path_ / ".lock";
  const std::string here = host_name();
  for (int waited = 0; !lock_; ++waited) {
    if (auto lock = FileLock::attempt(file, here)) {
      lock_.emplace(std::move(*lock));
      return;
    }
    const std::string host = read_text(file, 4096);
    if (host.empty() || host == here || waited >= kPatience) {
      throw UserError("{} is held by another job{}: wait for it, or give another --run", file.string(),
                      host.empty() ? "" : " on " + host);
    }
    if (waited == 0) {
      log_.info("{} is held by a job on {}; waiting for it to be let go, at most {} s", file.string(), host,
                kPatience);
    }
    world_.heartbeat().beat("waiting for the run directory");
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}

bool RunDirectory::count_start(index_t step, index_t budget) {
  std::vector<std::uint64_t> told = {0, 0};  // earlier starts, refused
  world_.run_on(0, [&] {
    const index_t starts = noted_starts(path_ / kStartsFile, step);
    const bool refused = budget > 0 && starts >= budget;
    if (!refused) note_starts(path_ / kStartsFile, step, starts + 1);
    told = {static_cast<std::uint64_t>(starts), refused ? 1U : 0U};
  });
  world_.all_reduce(told, ReduceOp::kSum);
  counted_step_ = step;
  earlier_starts_ = static_cast<index_t>(told[0]);
  return told[1] == 0;
}

void RunDirectory::forget_start() const noexcept {
  const std::filesystem::path file = path_ / kStartsFile;
  try {
    note_starts(file, counted_step_, earlier_starts_);
  } catch (const std::exception&) {
    // The disk may be full, which is what a person mends: then the earlier starts are forgotten too.
    std::error_code ignored;
    std::filesystem::remove(file, ignored);
  }
}

bool RunDirectory::stop_requested() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_look_) return false;
  next_look_ = now + std::chrono::seconds(1);
  std::error_code ignored;
  return std::filesystem::exists(path_ / kStopFile, ignored);
}

bool RunDirectory::clear_stop_request() const {
  std::vector<std::uint64_t> removed = {0};
  if (world_.rank() == 0) {
    std::error_code ignored;  // whoever made it may have removed it
    removed[0] = std::filesystem::remove(path_ / kStopFile, ignored) ? 1 : 0;
  }
  world_.all_reduce(removed, ReduceOp::kSum);
  return removed[0] != 0;
}

}  // namespace regroup
