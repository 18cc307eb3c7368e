#include "trainer/formats/zip_archive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/formats/torch_writer.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::little_endian_text;
using test::refusal;
using test::zip_of;
using test::ZipPart;
using testing::AllOf;
using testing::HasSubstr;

class ZipArchive : public testing::Test {
 protected:
  std::vector<ZipEntry> entries(const std::string& bytes) {
    write_text(directory_ / "a.zip", bytes);
    return read_zip_directory(InputFile(directory_ / "a.zip"));
  }
  std::string refused(const std::string& bytes) {
    return refusal([&] { entries(bytes); });
  }
  std::string refused_entry(const ZipPart& part) {
    return refused(zip_of({{"first", "1234"}, part, {"last", "5678"}}));
  }

  test::TemporaryDirectory directory_;
};

TEST_F(ZipArchive, ListsItsEntries) {
  const std::string bytes = zip_of({{"r/data.pkl", "12345"}, {"r/empty", ""}, {"../../etc/passwd", "x"}});
  const std::vector<ZipEntry> all = entries(bytes);
  ASSERT_EQ(all.size(), 3U);
  EXPECT_EQ(all[0].name, "r/data.pkl");
  EXPECT_EQ(bytes.substr(all[0].begin, all[0].bytes), "12345");
  EXPECT_EQ(all[1].bytes, 0U);
  EXPECT_EQ(all[2].name, "../../etc/passwd");  // a name, nothing more
  EXPECT_EQ(bytes.substr(all[2].begin, all[2].bytes), "x");
  EXPECT_TRUE(entries(zip_of({})).empty());
}

TEST_F(ZipArchive, SizesMayFollowTheData) {
  const ZipPart part = {.name = "streamed", .data = "abc", .flags = 8, .local_bytes = 0};
  EXPECT_EQ(entries(zip_of({part}))[0].bytes, 3U);
}

TEST_F(ZipArchive, RefusesEntriesByName) {
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .method = 8}),
              AllOf(HasSubstr("a.zip: "), HasSubstr("'e' is compressed (method 8)")));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .flags = 1}), HasSubstr("'e' is encrypted"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .flags = 0x2000}), HasSubstr("'e' is encrypted"));
  EXPECT_THAT(refused_entry({.name = "first", .data = "abc"}), HasSubstr("'first' is there twice"));
  EXPECT_THAT(refused_entry({.name = "a\nb", .data = ""}), HasSubstr("'a?b'"));
  EXPECT_THAT(refused_entry({.name = "", .data = ""}), HasSubstr("is empty"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .bytes = 4}), HasSubstr("'e' of 4 bytes overlaps"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .bytes = 0xFFFFFFFE}), HasSubstr("overlaps"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .bytes = 0xFFFFFFFF}), HasSubstr("no zip64 sizes"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .local_name = "f"}), HasSubstr("another name"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .local_name = "ef"}), HasSubstr("not where"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .local_bytes = 2}), HasSubstr("another name, size"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .local_bytes = 0}), HasSubstr("another name, size"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .place = 1}), HasSubstr("'e' is not where"));
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .place = 100000}),
              HasSubstr("'e' is at byte 100000 of a file of"));
  // Two names for one place, and an entry inside another.
  EXPECT_THAT(refused_entry({.name = "e", .data = "abc", .place = 0}), HasSubstr("'e' "));
  const std::string inner = zip_of({{"in", "abc"}}).substr(0, 30 + 2 + 3);
  EXPECT_THAT(refused(zip_of({{"out", "1" + inner}, {"in", "abc", 0, 0, 3, 30 + 3 + 1}})),
              HasSubstr("'out' of 36 bytes overlaps"));
}

TEST_F(ZipArchive, RefusesADamagedDirectory) {
  const std::string good = zip_of({{"a", "123"}, {"b", "456"}});
  const std::size_t end = good.size() - 22;
  const auto with = [&](std::size_t at, std::uint64_t value, int width) {
    std::string bytes = good;
    return bytes.replace(at, static_cast<std::size_t>(width), little_endian_text(value, width));
  };
  EXPECT_THAT(refused(""), HasSubstr("too few"));
  EXPECT_THAT(refused(good + "x"), HasSubstr("does not end as one"));
  EXPECT_THAT(refused(good.substr(1)), HasSubstr("does not lie where it should"));
  EXPECT_THAT(refused(with(end + 20, 5, 2) + "hello"), HasSubstr("does not end as one"));
  EXPECT_THAT(refused(with(end + 4, 1, 2)), HasSubstr("several parts"));
  EXPECT_THAT(refused(with(end + 8, 1, 2)), HasSubstr("several parts"));
  EXPECT_THAT(refused(with(end + 8, 0x00010001, 4)), HasSubstr("bytes too many"));
  EXPECT_THAT(refused(with(end + 8, 0x00030003, 4)), HasSubstr("directory is damaged"));
  EXPECT_THAT(refused(with(end + 12, 0xFFFFFFFF, 4)), HasSubstr("more than"));
  EXPECT_THAT(refused(with(end + 12, 0, 4)), HasSubstr("does not lie"));
  EXPECT_THAT(refused(with(end + 16, 0xFFFFFFFF, 4)), HasSubstr("does not lie"));
  const std::size_t first = good.find("PK\1\2");
  EXPECT_THAT(refused(with(first + 28, 0xFFFF, 2)), HasSubstr("directory is damaged"));
  EXPECT_THAT(refused(with(first + 30, 0xFFFF, 2)), HasSubstr("directory is damaged"));
  EXPECT_THAT(refused(with(first + 34, 1, 2)), HasSubstr("another part"));
  EXPECT_THAT(refused(with(first + 20, 2, 4)), HasSubstr("two sizes"));
}

// An archive whose end record says that all is in the zip64 one, whose entry's sizes and place are there too.
TEST_F(ZipArchive, ReadsZip64) {
  std::string local = zip_of({{"e", "abc", 0, 0, 0xFFFFFFFF}}).substr(0, 30 + 1);
  local.replace(28, 2, little_endian_text(20, 2));
  const std::string local_sizes = little_endian_text(1, 2) + little_endian_text(16, 2) +
                                  little_endian_text(3, 8) + little_endian_text(3, 8);
  const std::string central = std::string("PK\1\2") + std::string(16, '\0') + std::string(8, '\xff') +
                              little_endian_text(1, 2) + little_endian_text(28 + 6, 2) +
                              std::string(10, '\0') + std::string(4, '\xff') + "e" +
                              little_endian_text(7, 2) + little_endian_text(2, 2) + "??" +
                              little_endian_text(1, 2) + little_endian_text(24, 2) +
                              little_endian_text(3, 8) + little_endian_text(3, 8) + little_endian_text(0, 8);
  const std::string start = local + local_sizes + "abc";
  const auto end = [&](std::uint64_t begin, std::uint64_t entries, std::uint64_t locator) {
    return std::string("PK\6\6") + little_endian_text(44, 8) + std::string(12, '\0') +
           little_endian_text(entries, 8) + little_endian_text(entries, 8) +
           little_endian_text(central.size(), 8) + little_endian_text(begin, 8) +
           std::string("PK\6\7\0\0\0\0", 8) + little_endian_text(locator, 8) + little_endian_text(1, 4) +
           std::string("PK\5\6\0\0\0\0", 8) + std::string(12, '\xff') + std::string(2, '\0');
  };
  const std::size_t record = start.size() + central.size();
  const std::string good = start + central + end(start.size(), 1, record);
  const std::vector<ZipEntry> all = entries(good);
  ASSERT_EQ(all.size(), 1U);
  EXPECT_EQ(good.substr(all[0].begin, all[0].bytes), "abc");

  constexpr auto kHuge = ~std::uint64_t{0};
  EXPECT_THAT(refused(start + central + end(kHuge, 1, record)), HasSubstr("does not lie"));
  EXPECT_THAT(refused(start + central + end(start.size(), kHuge, record)), HasSubstr("more than"));
  EXPECT_THAT(refused(start + central + end(start.size(), 1, kHuge)), HasSubstr("zip64 records"));
  const auto with = [&](std::size_t at, std::uint64_t value) {
    std::string bytes = good;
    return bytes.replace(at, 8, little_endian_text(value, 8));
  };
  const std::size_t sizes = start.size() + 46 + 1 + 6 + 4;
  EXPECT_THAT(refused(with(sizes, kHuge)), HasSubstr("two sizes"));
  EXPECT_THAT(refused(with(sizes + 16, kHuge)), HasSubstr("'e' is at byte 18446744073709551615"));
  EXPECT_THAT(refused(with(local.size() + 4, 2)), HasSubstr("another name, size"));
}

}  // namespace
}  // namespace regroup
