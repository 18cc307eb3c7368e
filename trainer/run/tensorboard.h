// TensorBoard event files, scalars only, without TensorFlow.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

namespace regroup {

// CRC-32C (Castagnoli; RFC 3720, appendix B.4).
std::uint32_t crc32c(std::string_view bytes);

// Writes scalars to a new file `directory`/events.out.tfevents.<seconds>.<host>; seconds is the time, or what
// it takes to sort after the event files already there, for TensorBoard reads them in the order of their
// names.
//
// The file is TFRecords (tensorflow/core/lib/io/record_writer.h): length u64, masked crc32c of the length,
// data, masked crc32c of the data; each datum an Event (tensorflow/core/util/event.proto), the first with
// file_version "brain.Event:2". The second is a SessionLog START, at which TensorBoard drops what earlier
// files say from that step on: from resume_step + 1, or everything where the run starts afresh. A record
// reaches the operating system before the call returns.
//
// Errors: UserError naming the file where it cannot be written.
class TensorBoard {
 public:
  explicit TensorBoard(const std::filesystem::path& directory,
                       std::optional<std::int64_t> resume_step = std::nullopt);

  // The value after `step` steps, under a name such as "train/loss"; kept as float, NaN included.
  void scalar(std::string_view name, std::int64_t step, double value);

  const std::filesystem::path& path() const { return path_; }

 private:
  void write_record(const std::string& data);

  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace regroup
