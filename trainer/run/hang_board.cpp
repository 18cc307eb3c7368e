#include "trainer/run/hang_board.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
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
    if (whole) result.suspicious.push_back(rank);  // else it is still being written
  }
  if (failure && failure != std::errc::no_such_file_or_directory) {
    throw SystemError("cannot list {}: {}", folder_.string(), failure.message());
  }
  std::sort(result.suspicious.begin(), result.suspicious.end());
  return result;
}

void HangBoard::suspect() {
  regroup::create_directories(folder_);
  write_text(suspicion_file(rank_), "");
}

void HangBoard::withdraw_suspicion() { std::filesystem::remove(suspicion_file(rank_)); }

void HangBoard::report(const HangReport& report, const RankPlace& place) {
  write_text(report_file(rank_), to_json(report, place));
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
  const int descriptor = ::open(file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (descriptor < 0 && errno == EEXIST) return false;
  if (descriptor < 0) throw SystemError("cannot create {}: {}", file.string(), std::strerror(errno));
  // For whoever looks later; the claim stands even where a full disk does not take the text.
  [[maybe_unused]] const auto written = ::write(descriptor, text.data(), text.size());
  ::close(descriptor);
  return true;
}

}  // namespace regroup
