#include "trainer/run/unfinished_folder.h"

#include <vector>

#include "kernels/base/error.h"

namespace regroup {
namespace {

constexpr const char* kLock = ".exporting";

}  // namespace

UnfinishedFolder::UnfinishedFolder(const ProcessGroup& world, std::filesystem::path target)
    : world_(world), target_(std::move(target)), path_(target_) {
  path_ += ".partial";
  world_.run_on(0, [&] { take(); });
}

void UnfinishedFolder::take() {
  if (std::filesystem::exists(target_)) {
    throw UserError("{} is there already; give another --output", target_.string());
  }
  const std::filesystem::path lock = path_ / kLock;
  // An export that was killed at its very start left an empty folder.
  if (std::filesystem::exists(path_) && !std::filesystem::exists(lock) && !std::filesystem::is_empty(path_)) {
    throw UserError("{} is in the way, and not what an export left: move it, or give another --output",
                    path_.string());
  }
  regroup::create_directories(path_);
  if (auto held = FileLock::attempt(lock, "")) lock_.emplace(std::move(*held));
  if (!lock_) throw UserError("another job writes {}: wait for it, or give another --output", path_.string());
  std::vector<std::filesystem::path> left;
  for (const auto& entry : std::filesystem::directory_iterator(path_)) {
    if (entry.path() != lock) left.push_back(entry.path());
  }
  for (const auto& path : left) remove_tree(path);
}

UnfinishedFolder::~UnfinishedFolder() {
  if (!lock_) return;
  std::error_code ignored;  // what cannot be removed now, the next job uses
  std::filesystem::remove_all(path_, ignored);
}

void UnfinishedFolder::finish() {
  world_.run_on(0, [&] {
    remove_tree(path_ / kLock);
    sync_to_disk(path_);
    rename_durably(path_, target_);
    lock_.reset();
  });
}

}  // namespace regroup
