#include "trainer/run/hang_board.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fcntl.h>
#include <string_view>
#include <unistd.h>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {
namespace {

constexpr std::string_view kSuspicion = "suspicious-";
constexpr std::string_view kVerdict = "verdict";

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& file, int flags)
      : value_(::open(file.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644)) {}
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  bool valid() const { return value_ >= 0; }
  bool write(std::string_view text) const {
    return ::write(value_, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  }

 private:
  int value_;
};

[[noreturn]] void refuse(const std::filesystem::path& file) { throw_file_error("write", file, errno); }

}  // namespace

HangBoard::HangBoard(std::filesystem::path folder, int rank) : folder_(std::move(folder)), rank_(rank) {}

std::filesystem::path HangBoard::suspicion_file(int rank) const {
  return folder_ / fmt::format("{}{:05}", kSuspicion, rank);
}

std::filesystem::path HangBoard::report_file(int rank) const {
  return folder_ / fmt::format("rank-{:05}.json", rank);
}

HangBoard::Notices HangBoard::notices() const {
  Notices result;
  std::error_code failure;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, failure)) {
    const std::string name = entry.path().filename().string();
    if (name == kVerdict) result.judged = true;
    if (!name.starts_with(kSuspicion)) continue;
    int rank = 0;
    const char* const end = name.data() + name.size();
    const bool whole = std::from_chars(name.data() + kSuspicion.size(), end, rank).ptr == end;
    if (whole) result.suspicious.push_back(rank);
  }
  if (failure && failure != std::errc::no_such_file_or_directory) {
    throw_file_error("list", folder_, failure.value());
  }
  std::sort(result.suspicious.begin(), result.suspicious.end());
  return result;
}

void HangBoard::suspect() {
  regroup::create_directories(folder_);
  const std::filesystem::path file = suspicion_file(rank_);
  if (!Descriptor(file, O_TRUNC).valid()) refuse(file);
}

void HangBoard::withdraw_suspicion() { std::filesystem::remove(suspicion_file(rank_)); }

void HangBoard::report(const HangReport& report, const RankPlace& place) {
  const std::filesystem::path file = report_file(rank_);
  const std::filesystem::path aside = folder_ / fmt::format("next-{:05}", rank_);
  try {
    const Descriptor descriptor(aside, O_TRUNC);
    if (!descriptor.valid() || !descriptor.write(to_json(report, place))) refuse(aside);
    std::filesystem::rename(aside, file);  // whoever reads it finds the old one or the new one
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove(aside, ignored);
    throw;
  }
}

void HangBoard::withdraw_report() {
  std::filesystem::remove(report_file(rank_));
  std::error_code not_empty;  // or gone: the last one tidies up
  std::filesystem::remove(folder_, not_empty);
}

std::optional<HangReport> HangBoard::report_of(int rank) const {
  const std::filesystem::path file = report_file(rank);
  if (!std::filesystem::exists(file)) return std::nullopt;
  return hang_report_from_json(read_text(file, 1 << 20), file.string());
}

bool HangBoard::claim_verdict(const std::string& text) {
  const std::filesystem::path file = folder_ / kVerdict;
  // Only one of those that create it exclusively succeeds, on network file systems too.
  const Descriptor descriptor(file, O_EXCL);
  if (!descriptor.valid() && errno == EEXIST) return false;
  if (!descriptor.valid()) refuse(file);
  // For whoever looks later; the claim stands even where a full disk does not take the text.
  static_cast<void>(descriptor.write(text));
  return true;
}

}  // namespace regroup
