#include "trainer/commands/doctor_directory.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <optional>
#include <sys/vfs.h>
#include <thread>
#include <unistd.h>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kPatience{3};  // until another node's change must be seen
constexpr std::chrono::seconds kMostWriting{5};
constexpr std::uint64_t kMostBytes = std::uint64_t{64} << 20;  // of a rank
constexpr std::size_t kPiece = std::size_t{1} << 20;
constexpr int kFlushes = 3;
const char* const kFirst = "before";
const char* const kSecond = "after";

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What `work` throws, as text; "" for nothing.
std::string failure_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// A directory that is there for the life of this object. What it had to make, parents included, is removed
// again where nobody put anything into it.
class TemporaryPath {
 public:
  explicit TemporaryPath(const fs::path& path) {
    std::error_code ignored;
    for (fs::path part = path; !part.empty() && !fs::exists(part, ignored); part = part.parent_path()) {
      made_.push_back(part);
    }
    if (failure_ = failure_of([&] { regroup::create_directories(path); }); !failure_.empty()) return;
    trial_ = path / fmt::format(".doctor-{}-{}", getpid(), Clock::now().time_since_epoch().count());
    std::error_code error;
    if (!fs::create_directory(trial_, error)) {
      failure_ = fmt::format("cannot write into {}: {}", path.string(), error.message());
    }
  }
  ~TemporaryPath() {
    std::error_code ignored;
    if (!trial_.empty()) fs::remove_all(trial_, ignored);
    for (const fs::path& part : made_) fs::remove(part, ignored);
  }
  TemporaryPath(const TemporaryPath&) = delete;
  TemporaryPath& operator=(const TemporaryPath&) = delete;

  const std::string& failure() const { return failure_; }
  const fs::path& trial() const { return trial_; }  // the folder for files

 private:
  std::vector<fs::path> made_;  // deepest first
  fs::path trial_;
  std::string failure_;
};

// Whether the file comes to hold `text` within the patience that caches of network file systems need.
bool comes_to_hold(const fs::path& file, const std::string& text) {
  const auto end = Clock::now() + kPatience;
  for (;;) {
    std::string found;
    if (failure_of([&] { found = read_text(file); }).empty() && found == text) return true;
    if (Clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

std::string filesystem_name(const fs::path& path) {
  constexpr std::array<std::pair<std::uint32_t, const char*>, 12> kNames = {{{0x6969, "nfs"},
                                                                             {0x0BD00BD0, "lustre"},
                                                                             {0x47504653, "gpfs"},
                                                                             {0x19830326, "beegfs"},
                                                                             {0x00C36400, "ceph"},
                                                                             {0xFF534D42, "cifs"},
                                                                             {0x65735546, "fuse"},
                                                                             {0x01021994, "tmpfs"},
                                                                             {0x794C7630, "overlay"},
                                                                             {0xEF53, "ext4"},
                                                                             {0x58465342, "xfs"},
                                                                             {0x9123683E, "btrfs"}}};
  struct statfs status {};
  if (::statfs(path.c_str(), &status) != 0) return "";
  for (const auto& [magic, name] : kNames) {
    if (static_cast<std::uint32_t>(status.f_type) == magic) return name;
  }
  return "";
}

void write_files(const fs::path& trial, const ProcessGroup& world, DirectoryFacts& facts) {
  const fs::path large = trial / fmt::format("rank-{}", world.rank());
  const std::uint64_t share = facts.free / (4 * static_cast<std::uint64_t>(world.size()));
  const std::vector<std::byte> piece(kPiece, std::byte{0x5a});
  const auto start = Clock::now();
  OutputFile file(large);
  while (facts.written + kPiece <= std::min(kMostBytes, share) && Clock::now() - start < kMostWriting) {
    file.write(piece);
    facts.written += kPiece;
  }
  file.commit();
  facts.write_seconds = seconds_since(start);
}

void flush_files(const fs::path& trial, const ProcessGroup& world, DirectoryFacts& facts) {
  const std::string text(4096, '.');
  for (int flush = 0; flush < kFlushes; ++flush) {
    const auto start = Clock::now();
    write_text(trial / fmt::format("small-{}", world.rank()), text);
    facts.flush_seconds = std::max(facts.flush_seconds, seconds_since(start));
  }
}

// Rank 0 holds a lock, which all others (and rank 0 by another descriptor) must be refused.
void try_lock(const fs::path& trial, const ProcessGroup& world, DirectoryFacts& facts) {
  const fs::path file = trial / "lock";
  std::optional<FileLock> held;
  if (world.rank() == 0)
    facts.lock_error = failure_of([&] {
      if (auto lock = FileLock::attempt(file, "doctor")) held.emplace(std::move(*lock));
    });
  const bool works = world.broadcast(facts.lock_error).empty();
  if (works && facts.seen) {
    try {
      facts.locked_out = !FileLock::attempt(file, "doctor").has_value();
    } catch (const std::exception& error) {
      facts.lock_error = error.what();
    }
  }
  world.barrier();
}

}  // namespace

DirectoryTrial try_directory(const ProcessGroup& world, const fs::path& run) {
  DirectoryTrial result;
  DirectoryFacts& facts = result.facts;
  std::unique_ptr<TemporaryPath> own;
  if (world.rank() == 0) {
    result.error = failure_of([&] {
      own = std::make_unique<TemporaryPath>(run);
      if (!own->failure().empty()) throw UserError("{}", own->failure());
      write_text(own->trial() / "token", kFirst);
    });
  }
  result.error = world.broadcast(result.error);
  if (!result.error.empty()) return result;
  const fs::path trial = world.broadcast(own ? own->trial().string() : "");
  const fs::path token = trial / "token";

  facts.seen = comes_to_hold(token, kFirst);
  const auto attempt = [&](const auto& work) {
    world.barrier();
    if (!facts.seen || !facts.error.empty()) return;
    facts.error = failure_of([&] { work(); });
  };
  attempt([&] {
    facts.free = fs::space(trial).available;
    facts.filesystem = filesystem_name(trial);
  });
  attempt([&] { write_files(trial, world, facts); });
  attempt([&] { flush_files(trial, world, facts); });
  attempt([&] {
    if (world.rank() == 0) write_text(token, kSecond);
  });
  attempt([&] { facts.renamed = comes_to_hold(token, kSecond); });
  try_lock(trial, world, facts);
  return result;  // every rank has left the folder: rank 0 removes it
}

}  // namespace regroup
