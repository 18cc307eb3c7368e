#include "kernels/base/file.h"

#include <fstream>
#include <unistd.h>

#include <gtest/gtest.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text.data(), text.size()));
  return {bytes.begin(), bytes.end()};
}

class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* const test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              fmt::format("regroup-file-test-{}-{}", ::getpid(), test->name());
    regroup::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder_), {}));
  }

  std::filesystem::path folder_;
};

TEST_F(FileTest, WhatIsWrittenIsRead) {
  const auto path = folder_ / "a";
  write_text(path, "one\0two");
  write_text(path, "three");
  EXPECT_EQ(read_text(path), "three");
  EXPECT_EQ(entries(), 1U);
}

TEST_F(FileTest, AFileAppearsOnlyWhenCommitted) {
  const auto path = folder_ / "a";
  write_text(path, "old");
  {
    OutputFile file(path);
    file.write("new, but never finished");
    EXPECT_EQ(read_text(path), "old");
  }
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(entries(), 1U);
  OutputFile file(path);
  file.write("ne");
  OutputFile moved(std::move(file));
  moved.write("w");
  moved.commit();
  EXPECT_EQ(read_text(path), "new");
  EXPECT_EQ(entries(), 1U);
}

TEST_F(FileTest, ReadsAtAnOffsetAndReportsTruncation) {
  const auto path = folder_ / "a";
  write_text(path, "0123456789");
  const InputFile file(path);
  EXPECT_EQ(file.size(), 10U);
  std::vector<std::byte> part(4);
  file.read(3, part);
  EXPECT_EQ(part, bytes_of("3456"));
  try {
    file.read(8, part);
    FAIL() << "a read past the end succeeded";
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("truncated"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
  }
}

TEST_F(FileTest, RefusesWhatIsNotAReadableFile) {
  EXPECT_THROW(InputFile(folder_ / "absent"), UserError);
  EXPECT_THROW(InputFile(folder_.string()), UserError);
  EXPECT_THROW(OutputFile(folder_ / "no" / "such" / "folder"), UserError);
  write_text(folder_ / "a", "12345");
  EXPECT_THROW(read_text(folder_ / "a", 4), UserError);
  EXPECT_THROW(regroup::create_directories(folder_ / "a" / "b"), UserError);
}

TEST_F(FileTest, ChecksumOfAFileIsThatOfItsBytes) {
  std::string text(3'000'000, 'x');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 251);
  write_text(folder_ / "a", text);
  const std::uint64_t sum = checksum_file(folder_ / "a");
  EXPECT_EQ(sum, checksum(bytes_of(text)));
  text[2'500'000] = static_cast<char>(text[2'500'000] ^ 1);
  write_text(folder_ / "a", text);
  EXPECT_NE(checksum_file(folder_ / "a"), sum);
  write_text(folder_ / "empty", "");
  EXPECT_EQ(checksum_file(folder_ / "empty"), 0x2d06800538d394c2U);  // XXH3, seed 0, of nothing
}

}  // namespace
}  // namespace regroup
