// A folder that appears whole or not at all: it is filled under another name.
#pragma once

#include <filesystem>
#include <optional>

#include "kernels/base/file.h"
#include "parallel/process_group.h"

namespace regroup {

// Rank 0 makes and locks <target>.partial, empty but for the lock, and removes it again on destruction where
// finish() was not called; what a killed job left there is used anew. Its members are collective.
class UnfinishedFolder {
 public:
  // UserError where the target is there already, where another job fills it, or where something else has the
  // other name.
  UnfinishedFolder(const ProcessGroup& world, std::filesystem::path target);
  ~UnfinishedFolder();
  UnfinishedFolder(const UnfinishedFolder&) = delete;
  UnfinishedFolder& operator=(const UnfinishedFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }  // where the files go
  // Brings the folder to the disk under its name.
  void finish();

 private:
  void take();

  const ProcessGroup& world_;
  std::filesystem::path target_, path_;
  std::optional<FileLock> lock_;  // rank 0
};

}  // namespace regroup
