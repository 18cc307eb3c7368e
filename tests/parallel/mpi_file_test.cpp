#include "parallel/mpi_file.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <sys/resource.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/random.h"

namespace regroup {
namespace {

// A row-major array at a place in a file, cut into parts along one dimension.
struct Array {
  std::uint64_t offset = 0;
  std::vector<index_t> shape;
  index_t element_bytes = 0;
  int dim = 0;
  std::vector<index_t> cuts;  // part i is [cuts[i], cuts[i + 1])

  std::uint64_t bytes() const {
    return static_cast<std::uint64_t>(
        std::accumulate(shape.begin(), shape.end(), element_bytes, std::multiplies<>()));
  }
  std::size_t parts() const { return cuts.size() - 1; }
};

// The byte of the file at `position`, where an array covers it.
std::byte byte_at(std::uint64_t position) {
  return static_cast<std::byte>(position * 131 + (position >> 8) * 17 + 1);
}

// Part `part` of the array as a block over `memory`, which it resizes. `filled`: with the bytes of the file.
FileBlock block_of(const Array& array, std::size_t part, std::vector<std::byte>& memory, bool filled) {
  FileBlock block{.offset = array.offset,
                  .shape = array.shape,
                  .element_bytes = array.element_bytes,
                  .dim = array.dim,
                  .begin = array.cuts[part],
                  .end = array.cuts[part + 1]};
  const std::uint64_t width = static_cast<std::uint64_t>(array.element_bytes);
  const auto dim = static_cast<std::size_t>(array.dim);
  std::uint64_t inner = 1;
  for (std::size_t d = dim + 1; d < array.shape.size(); ++d)
    inner *= static_cast<std::uint64_t>(array.shape[d]);
  const std::uint64_t length = array.shape.empty() ? 1 : static_cast<std::uint64_t>(array.shape[dim]);
  memory.clear();
  // The definition: the elements of the array whose index along dim is in the part, in the array's order.
  for (std::uint64_t element = 0; element < array.bytes() / width; ++element) {
    const auto index = static_cast<index_t>(element / inner % length);
    if (!array.shape.empty() && (index < block.begin || index >= block.end)) continue;
    for (std::uint64_t b = 0; b < width; ++b) {
      memory.push_back(filled ? byte_at(array.offset + element * width + b) : std::byte{0});
    }
  }
  block.memory = memory.data();
  return block;
}

// Arrays of random shapes one after another with gaps, each cut into `parts` random parts, some empty.
std::vector<Array> random_arrays(std::uint64_t seed, int count, std::size_t parts) {
  const Philox random(seed, RandomPurpose::kTest);
  std::uint64_t draw = 0;
  const auto below = [&](std::uint64_t bound) { return random.below(bound, draw++); };
  std::vector<Array> arrays;
  std::uint64_t offset = below(100);
  for (int i = 0; i < count; ++i) {
    Array array{.offset = offset, .shape = {}, .element_bytes = index_t{1} << below(4), .dim = 0, .cuts = {}};
    const std::uint64_t rank = 1 + below(4);
    for (std::uint64_t d = 0; d < rank; ++d)
      array.shape.push_back(static_cast<index_t>(below(rank > 2 ? 9 : 60)));
    array.dim = static_cast<int>(below(rank));
    const index_t length = array.shape[static_cast<std::size_t>(array.dim)];
    array.cuts = {0, length};
    while (array.cuts.size() <= parts)
      array.cuts.push_back(static_cast<index_t>(below(std::uint64_t(length) + 1)));
    std::sort(array.cuts.begin(), array.cuts.end());
    offset += array.bytes() + (below(2) == 0 ? 0 : below(1000));
    arrays.push_back(array);
  }
  return arrays;
}

class MpiFile : public testing::Test {
 protected:
  ProcessGroup world_ = ProcessGroup::world();
  std::filesystem::path folder_;

  void SetUp() override {
    world_.run_on(0, [&] {
      std::string name = (std::filesystem::temp_directory_path() / "regroup_XXXXXX").string();
      if (::mkdtemp(name.data()) == nullptr) throw SystemError("mkdtemp");
      folder_ = name;
    });
    folder_ = world_.broadcast(folder_.string());
  }
  void TearDown() override {
    world_.barrier();
    if (world_.rank() == 0) std::filesystem::remove_all(folder_);
  }

  // Part p of each array is written by rank p modulo the number of ranks.
  void write(const std::filesystem::path& path, const std::vector<Array>& arrays, std::uint64_t size) {
    std::vector<std::vector<std::byte>> memory;
    std::vector<FileBlock> blocks;
    for (const Array& array : arrays) {
      for (std::size_t part = 0; part < array.parts(); ++part) {
        if (part % static_cast<std::size_t>(world_.size()) != static_cast<std::size_t>(world_.rank()))
          continue;
        blocks.push_back(block_of(array, part, memory.emplace_back(), true));
      }
    }
    write_collectively(world_, path, size, blocks);
  }

  static std::string expected_file(const std::vector<Array>& arrays, std::uint64_t size) {
    std::string bytes(size, '\0');
    for (const Array& array : arrays) {
      for (std::uint64_t i = array.offset; i < array.offset + array.bytes(); ++i) {
        bytes[i] = static_cast<char>(byte_at(i));
      }
    }
    return bytes;
  }

  // The message of the UserError; fails where ranks differ.
  std::string refusal(const std::function<void()>& work) {
    std::string message = "no error";
    try {
      work();
    } catch (const UserError& error) {
      message = error.what();
    }
    for (const std::string& other : world_.all_gather(message)) EXPECT_EQ(other, message);
    return message;
  }
};

TEST_F(MpiFile, RandomBlocksOverRanksMakeTheFile) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const auto size_of_world = static_cast<std::size_t>(world_.size());
    // Every third time each rank has two parts of each array: they interleave in the file.
    const auto arrays = random_arrays(seed, 9, seed % 3 == 0 ? 2 * size_of_world : size_of_world);
    const std::uint64_t size = arrays.back().offset + arrays.back().bytes() + seed;
    const auto path = folder_ / fmt::format("file-{}", seed);
    write(path, arrays, size);
    EXPECT_TRUE(read_text(path) == expected_file(arrays, size)) << "seed " << seed;
  }
}

TEST_F(MpiFile, ReadsAnyPartsBack) {
  const auto arrays = random_arrays(99, 12, 3);
  const std::uint64_t size = arrays.back().offset + arrays.back().bytes();
  const auto path = folder_ / "file";
  write(path, arrays, size);
  for (const Array& array : arrays) {
    for (std::size_t part = 0; part < array.parts(); ++part) {
      std::vector<std::byte> read;
      std::vector<std::byte> expected;
      block_of(array, part, expected, true);
      read_blocks(path, {block_of(array, part, read, false)});
      EXPECT_TRUE(read == expected);
    }
  }
}

// Rows short enough to be read by spans (several spans), and rows read one by one.
TEST_F(MpiFile, ReadsShortAndLongRows) {
  const auto path = folder_ / "file";
  for (const index_t columns : {300, 50'000}) {
    const Array array{.offset = 13,
                      .shape = {1001, columns},
                      .element_bytes = 2,
                      .dim = 1,
                      .cuts = {0, columns / 3, columns / 3, columns}};
    Array small = array;
    if (columns > 1000) small.shape[0] = 21;
    write(path, {small}, small.offset + small.bytes());
    for (std::size_t part = 0; part < small.parts(); ++part) {
      std::vector<std::byte> read;
      std::vector<std::byte> expected;
      block_of(small, part, expected, true);
      read_blocks(path, {block_of(small, part, read, false)});
      EXPECT_TRUE(read == expected);
    }
  }
}

TEST_F(MpiFile, ScalarsEmptyRanksAndEmptyFiles) {
  const Array scalar{.offset = 4, .shape = {}, .element_bytes = 8, .dim = 0, .cuts = {0, 0}};
  write(folder_ / "scalar", {scalar}, 12);  // from rank 0 alone
  EXPECT_EQ(read_text(folder_ / "scalar"), expected_file({scalar}, 12));
  write(folder_ / "nothing", {}, 1000);
  EXPECT_EQ(read_text(folder_ / "nothing"), std::string(1000, '\0'));
  write(folder_ / "empty", {}, 0);
  EXPECT_EQ(std::filesystem::file_size(folder_ / "empty"), 0U);
}

TEST_F(MpiFile, ReplacesALongerFile) {
  const auto path = folder_ / "file";
  world_.run_on(0, [&] { write_text(path, std::string(5000, 'x')); });
  write(path, {}, 10);
  EXPECT_EQ(read_text(path), std::string(10, '\0'));
}

TEST_F(MpiFile, UnwritablePathsAreRefusedOnEveryRank) {
  const auto missing = folder_ / "missing" / "file";
  EXPECT_EQ(refusal([&] { write(missing, {}, 10); }),
            fmt::format("cannot write {}: No such file or directory", missing.string()));
  EXPECT_EQ(refusal([&] { write(folder_, {}, 10); }),
            fmt::format("cannot write {}: Is a directory", folder_.string()));
}

TEST_F(MpiFile, AFullDiskIsRefusedOnEveryRankAndLeavesNothing) {
  const auto path = folder_ / "file";
  const std::uint64_t size =
      world_.all_gather(std::vector<std::uint64_t>{2 * std::filesystem::space(folder_).capacity})[0][0];
  EXPECT_EQ(refusal([&] { write(path, {}, size); }),
            fmt::format("cannot write {} ({} bytes): No space left on device", path.string(), size));
  world_.barrier();
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(MpiFile, AFileSizeLimitOfOneRankIsRefusedOnEveryRank) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit limited = before;
  limited.rlim_cur = 4096;
  if (world_.rank() == world_.size() - 1) {
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limited), 0);
  }
  const auto path = folder_ / "file";
  const std::string message = refusal([&] { write(path, {}, 4097); });
  EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  const std::string where = world_.size() == 1 ? "" : fmt::format("on rank {}: ", world_.size() - 1);
  EXPECT_EQ(message,
            fmt::format("{}cannot write {}: it will have 4097 bytes and this process may write files of "
                        "at most 4096; raise the limit (ulimit -f)",
                        where, path.string()));
}

TEST_F(MpiFile, BlocksPastTheEndOrOverlappingAreBugs) {
  const Array array{.offset = 0, .shape = {10}, .element_bytes = 1, .dim = 0, .cuts = {0, 10}};
  EXPECT_THROW(write(folder_ / "file", {array}, 9), InternalError);
  EXPECT_THROW(write(folder_ / "file", {array, array}, 10), InternalError);
}

TEST_F(MpiFile, ShortAndMissingFilesAreRefusedInReading) {
  const auto path = folder_ / "file";
  const Array array{.offset = 2, .shape = {4, 6}, .element_bytes = 4, .dim = 1, .cuts = {0, 3, 6}};
  world_.run_on(0, [&] { write_text(path, std::string(97, 'x')); });  // one byte short
  std::vector<std::byte> memory;
  const std::string message = refusal([&] { read_blocks(path, {block_of(array, 1, memory, false)}); });
  EXPECT_NE(message.find(path.string() + " is truncated"), std::string::npos) << message;
  EXPECT_NE(refusal([&] { read_blocks(folder_ / "missing", {}); }).find("No such file"), std::string::npos);
}

}  // namespace
}  // namespace regroup
