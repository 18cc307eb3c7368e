// A temporary directory that all ranks of a group see: rank 0 makes it and removes it.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "parallel/process_group.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup::test {

class SharedDirectory {
 public:
  explicit SharedDirectory(const ProcessGroup& group) : group_(group) {
    if (group.rank() == 0) owner_.emplace();
    path_ = group.broadcast(owner_ ? owner_->path().string() : "");
  }
  ~SharedDirectory() { group_.barrier(); }  // before rank 0 removes it
  SharedDirectory(const SharedDirectory&) = delete;
  SharedDirectory& operator=(const SharedDirectory&) = delete;

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  ProcessGroup group_;
  std::optional<TemporaryDirectory> owner_;
  std::filesystem::path path_;
};

}  // namespace regroup::test
