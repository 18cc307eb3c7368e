#include "trainer/run/tensorboard.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

template <class T>
T take(std::string_view& bytes) {
  if (bytes.size() < sizeof(T)) throw std::runtime_error("ends early");
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  bytes.remove_prefix(sizeof(T));
  return value;
}

// As record_reader.cc undoes the mask, rather than as record_writer.h makes it.
std::uint32_t unmask(std::uint32_t masked) { return std::rotl(masked - 0xA282EAD8U, 15); }

std::vector<std::string> read_records(std::string_view bytes) {
  std::vector<std::string> records;
  while (!bytes.empty()) {
    const std::string_view header = bytes.substr(0, 8);
    const auto length = take<std::uint64_t>(bytes);
    EXPECT_EQ(unmask(take<std::uint32_t>(bytes)), crc32c(header));
    records.emplace_back(bytes.substr(0, length));
    bytes.remove_prefix(length);
    EXPECT_EQ(unmask(take<std::uint32_t>(bytes)), crc32c(records.back()));
  }
  return records;
}

// A protobuf message as its fields in order; numbers as their bits.
struct Field {
  std::uint32_t number;
  std::uint64_t bits;
  std::string bytes;
};

std::uint64_t take_varint(std::string_view& bytes) {
  std::uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    const auto byte = take<std::uint8_t>(bytes);
    value |= std::uint64_t{byte & 0x7FU} << shift;
    if (byte < 0x80) return value;
  }
}

std::vector<Field> decode(std::string_view bytes) {
  std::vector<Field> fields;
  while (!bytes.empty()) {
    const auto tag = take_varint(bytes);
    Field field = {static_cast<std::uint32_t>(tag >> 3), 0, {}};
    switch (tag & 7) {
      case 0:
        field.bits = take_varint(bytes);
        break;
      case 1:
        field.bits = take<std::uint64_t>(bytes);
        break;
      case 5:
        field.bits = take<std::uint32_t>(bytes);
        break;
      case 2: {
        const auto length = take_varint(bytes);
        field.bytes = bytes.substr(0, length);
        bytes.remove_prefix(length);
        break;
      }
      default:
        throw std::runtime_error("wire type");
    }
    fields.push_back(field);
  }
  return fields;
}

const Field& field(const std::vector<Field>& fields, std::uint32_t number) {
  for (const auto& f : fields) {
    if (f.number == number) return f;
  }
  throw std::runtime_error("no such field");
}

struct Scalar {
  std::string name;
  std::int64_t step;
  float value;
};

Scalar scalar_of(const std::string& record) {
  const auto event = decode(record);
  const auto value = decode(field(decode(field(event, 5).bytes), 1).bytes);
  return {field(value, 1).bytes, static_cast<std::int64_t>(field(event, 2).bits),
          std::bit_cast<float>(static_cast<std::uint32_t>(field(value, 2).bits))};
}

// RFC 3720, appendix B.4, and the check value of the CRC catalogue.
TEST(Crc32cTest, KnownVectors) {
  EXPECT_EQ(crc32c(""), 0U);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283U);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAU);
  EXPECT_EQ(crc32c(std::string(32, '\xFF')), 0x62A8AB43U);
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending.push_back(c);
  EXPECT_EQ(crc32c(ascending), 0x46DD794EU);
  EXPECT_EQ(crc32c(std::string(ascending.rbegin(), ascending.rend())), 0x113FDB5CU);
}

TEST(TensorBoardTest, RecordsDecodeToWhatWasWritten) {
  const test::TemporaryDirectory directory;
  const std::int64_t far = (std::int64_t{1} << 40) + 3;
  const std::string long_name(300, 'n');
  std::filesystem::path path;
  {
    TensorBoard board(directory / "events");
    path = board.path();
    board.scalar("train/loss", 1, 5.4321);
    board.scalar(long_name, far, std::numeric_limits<double>::quiet_NaN());
  }
  EXPECT_EQ(path.filename().string().rfind("events.out.tfevents.", 0), 0U);
  const auto records = read_records(read_text(path));
  ASSERT_EQ(records.size(), 4U);

  const auto version = decode(records[0]);
  EXPECT_EQ(field(version, 3).bytes, "brain.Event:2");
  EXPECT_GT(std::bit_cast<double>(field(version, 1).bits), 1.6e9);

  const auto start = decode(records[1]);
  EXPECT_EQ(field(start, 2).bits, 0U);
  EXPECT_EQ(field(decode(field(start, 7).bytes), 1).bits, 1U);

  const Scalar loss = scalar_of(records[2]);
  EXPECT_EQ(loss.name, "train/loss");
  EXPECT_EQ(loss.step, 1);
  EXPECT_EQ(loss.value, 5.4321F);
  const Scalar other = scalar_of(records[3]);
  EXPECT_EQ(other.name, long_name);
  EXPECT_EQ(other.step, far);
  EXPECT_TRUE(std::isnan(other.value));
}

TEST(TensorBoardTest, AResumeStartsALaterFileThatPurgesWhatComesAfterItsStep) {
  const test::TemporaryDirectory directory;
  const TensorBoard first(directory.path());
  const TensorBoard second(directory.path(), 10);
  EXPECT_LT(first.path(), second.path()) << "TensorBoard reads files in the order of their names";
  const auto start = decode(read_records(read_text(second.path())).at(1));
  EXPECT_EQ(field(start, 2).bits, 11U);
  EXPECT_EQ(field(decode(field(start, 7).bytes), 1).bits, 1U);
}

TEST(TensorBoardTest, AFileFromAClockAheadStillSortsBefore) {
  const test::TemporaryDirectory directory;
  write_text(directory / "events.out.tfevents.9000000000.elsewhere", "");
  const TensorBoard board(directory.path(), 10);
  EXPECT_EQ(board.path().filename().string().rfind("events.out.tfevents.9000000001.", 0), 0U);
}

TEST(TensorBoardTest, ARecordIsInTheFileWhenScalarReturns) {
  const test::TemporaryDirectory directory;
  TensorBoard board(directory.path());
  for (std::size_t i = 1; i <= 3; ++i) {
    board.scalar("a", static_cast<std::int64_t>(i), 0.5);
    EXPECT_EQ(read_records(read_text(board.path())).size(), 2 + i);
  }
}

TEST(TensorBoardTest, AnUnwritableDirectoryIsAUserError) {
  const test::TemporaryDirectory directory;
  write_text(directory / "file", "");
  EXPECT_THROW(TensorBoard(directory / "file"), UserError);
}

}  // namespace
}  // namespace regroup
