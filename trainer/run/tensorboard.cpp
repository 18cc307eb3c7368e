#include "trainer/run/tensorboard.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <system_error>
#include <unistd.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {
namespace {

constexpr std::string_view kPrefix = "events.out.tfevents.";

constexpr std::array<std::uint32_t, 256> make_crc32c_table() {
  std::array<std::uint32_t, 256> table = {};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78U : 0U);
    table[byte] = crc;
  }
  return table;
}
constexpr auto kCrc32cTable = make_crc32c_table();

// TFRecord's mask: a crc over data that itself holds crcs is weak (record_writer.h).
std::uint32_t masked_crc32c(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xA282EAD8U; }

void put_fixed(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xFF));
}

// The protobuf wire format (protobuf.dev/programming-guides/encoding): a tag, field << 3 | type, then the
// value.
enum WireType : std::uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void put_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>((value & 0x7F) | 0x80));
  out.push_back(static_cast<char>(value));
}
void put_tag(std::string& out, std::uint32_t field, WireType type) { put_varint(out, field << 3 | type); }
void put_integer(std::string& out, std::uint32_t field, std::int64_t value) {
  put_tag(out, field, kVarint);
  put_varint(out, static_cast<std::uint64_t>(value));
}
void put_double(std::string& out, std::uint32_t field, double value) {
  put_tag(out, field, kFixed64);
  put_fixed(out, std::bit_cast<std::uint64_t>(value), 8);
}
void put_float(std::string& out, std::uint32_t field, float value) {
  put_tag(out, field, kFixed32);
  put_fixed(out, std::bit_cast<std::uint32_t>(value), 4);
}
void put_bytes(std::string& out, std::uint32_t field, std::string_view value) {
  put_tag(out, field, kBytes);
  put_varint(out, value.size());
  out += value;
}

double seconds_since_epoch() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Event: wall_time = 1 (double), step = 2 (int64).
std::string start_event(std::int64_t step) {
  std::string event;
  put_double(event, 1, seconds_since_epoch());
  put_integer(event, 2, step);
  return event;
}

// The seconds in an event file's name, or 0 for another file.
std::int64_t seconds_in_name(const std::string& name) {
  std::int64_t seconds = 0;
  if (name.starts_with(kPrefix))
    std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), seconds);
  return seconds;
}

std::filesystem::path next_path(const std::filesystem::path& directory) {
  auto seconds = static_cast<std::int64_t>(seconds_since_epoch());
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    seconds = std::max(seconds, seconds_in_name(entry.path().filename().string()) + 1);
  }
  std::array<char, 256> host = {};
  if (::gethostname(host.data(), host.size() - 1) != 0) host = {"unknown"};
  return directory / fmt::format("{}{:010}.{}", kPrefix, seconds, host.data());
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const char byte : bytes)
    crc = (crc >> 8) ^ kCrc32cTable[(crc ^ static_cast<unsigned char>(byte)) & 0xFF];
  return ~crc;
}

TensorBoard::TensorBoard(const std::filesystem::path& directory, std::optional<std::int64_t> resume_step) {
  regroup::create_directories(directory);
  path_ = next_path(directory);
  file_.open(path_, std::ios::binary);

  std::string version = start_event(0);
  put_bytes(version, 3, "brain.Event:2");  // Event.file_version
  write_record(version);

  std::string log;
  put_integer(log, 1, 1);  // SessionLog.status = START
  std::string start = start_event(resume_step ? *resume_step + 1 : 0);
  put_bytes(start, 7, log);  // Event.session_log
  write_record(start);
}

void TensorBoard::scalar(std::string_view name, std::int64_t step, double value) {
  std::string entry;  // Summary.Value
  put_bytes(entry, 1, name);
  put_float(entry, 2, static_cast<float>(value));
  std::string summary;
  put_bytes(summary, 1, entry);
  std::string event = start_event(step);
  put_bytes(event, 5, summary);
  write_record(event);
}

void TensorBoard::write_record(const std::string& data) {
  std::string record;
  put_fixed(record, data.size(), 8);
  put_fixed(record, masked_crc32c(record), 4);
  record += data;
  put_fixed(record, masked_crc32c(data), 4);
  file_.write(record.data(), static_cast<std::streamsize>(record.size())).flush();
  if (!file_) {
    throw UserError("cannot write the TensorBoard events {}: {}", path_.string(),
                    std::generic_category().message(errno));
  }
}

}  // namespace regroup
