#include "trainer/formats/slice_runs.h"

#include <functional>
#include <numeric>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/random.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

// A slice of a row-major array, by definition.
struct Cut {
  std::vector<index_t> shape;
  index_t element_bytes = 1;
  int dim = 0;
  index_t begin = 0, end = 0;

  std::uint64_t bytes() const {
    return static_cast<std::uint64_t>(
        std::accumulate(shape.begin(), shape.end(), element_bytes, std::multiplies<>()));
  }
  // Whether the slice has byte `at` of the array.
  bool has(std::uint64_t at) const {
    if (shape.empty()) return true;
    std::uint64_t inner = static_cast<std::uint64_t>(element_bytes);
    for (auto d = static_cast<std::size_t>(dim) + 1; d < shape.size(); ++d)
      inner *= static_cast<std::uint64_t>(shape[d]);
    const auto index = static_cast<index_t>(at / inner) % shape[static_cast<std::size_t>(dim)];
    return begin <= index && index < end;
  }
  SliceRuns runs() const { return runs_of(shape, element_bytes, dim, begin, end); }
};

std::vector<Cut> random_cuts(std::uint64_t seed, int count) {
  const Philox random(seed, RandomPurpose::kTest);
  std::uint64_t draw = 0;
  const auto below = [&](index_t bound) {
    return static_cast<index_t>(random.below(static_cast<std::uint64_t>(bound), draw++));
  };
  std::vector<Cut> cuts = {{.shape = {}, .element_bytes = 8}};
  for (int i = 0; i < count; ++i) {
    Cut cut{.shape = {}, .element_bytes = index_t{1} << below(4)};
    const index_t rank = 1 + below(4);
    for (index_t d = 0; d < rank; ++d) cut.shape.push_back(below(rank > 2 ? 7 : 40));
    cut.dim = static_cast<int>(below(rank));
    cut.end = below(cut.shape[static_cast<std::size_t>(cut.dim)] + 1);
    cut.begin = below(cut.end + 1);
    cuts.push_back(cut);
  }
  return cuts;
}

TEST(SliceRuns, CountWhatLiesBeforeAndWithin) {
  for (const Cut& cut : random_cuts(1, 200)) {
    const SliceRuns runs = cut.runs();
    std::uint64_t before = 0;
    for (std::uint64_t at = 0; at <= cut.bytes(); ++at) {
      ASSERT_EQ(runs.before(at), before) << at;
      if (at < cut.bytes() && cut.has(at)) ++before;
    }
    const std::uint64_t begin = cut.bytes() / 3, end = cut.bytes() - cut.bytes() / 4;
    std::vector<std::uint64_t> found, expected;
    runs.for_each_within(begin, end, [&](std::uint64_t at, std::uint64_t bytes) {
      for (std::uint64_t i = 0; i < bytes; ++i) found.push_back(at + i);
    });
    for (std::uint64_t at = begin; at < end; ++at) {
      if (cut.has(at)) expected.push_back(at);
    }
    ASSERT_EQ(found, expected);
  }
}

TEST(SliceRuns, AreReadFromAFile) {
  const test::TemporaryDirectory folder;
  constexpr std::uint64_t kBegin = 13;
  const auto check_reading = [&](const Cut& cut) {
    std::string text(kBegin + cut.bytes(), '\0');
    for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 131 + (i >> 8) * 17 + 1);
    write_text(folder.path() / "file", text);
    std::string expected;
    for (std::uint64_t at = 0; at < cut.bytes(); ++at) {
      if (cut.has(at)) expected += text[kBegin + at];
    }
    std::string found(expected.size(), '\0');
    read_runs(InputFile(folder.path() / "file"), kBegin, cut.runs(),
              reinterpret_cast<std::byte*>(found.data()));
    ASSERT_EQ(found, expected);
  };
  for (const Cut& cut : random_cuts(2, 40)) check_reading(cut);
  // Rows short enough to be read by spans (several spans), and rows read one by one.
  for (const index_t columns : {300, 50'000}) {
    for (const index_t begin : {index_t{0}, columns / 3}) {
      check_reading({.shape = {columns > 1000 ? 21 : 4001, columns},
                     .element_bytes = 2,
                     .dim = 1,
                     .begin = begin,
                     .end = columns - 2});
    }
  }
}

TEST(SliceRuns, AShortFileIsRefused) {
  const test::TemporaryDirectory folder;
  const Cut cut{.shape = {4, 6}, .element_bytes = 4, .dim = 1, .begin = 3, .end = 6};
  write_text(folder.path() / "file", std::string(97, 'x'));  // one byte short
  std::vector<std::byte> memory(48);
  EXPECT_THROW(read_runs(InputFile(folder.path() / "file"), 2, cut.runs(), memory.data()), UserError);
}

TEST(SliceRuns, WhatIsNoSliceIsABug) {
  EXPECT_THROW(runs_of({4, 6}, 4, 1, 3, 7), InternalError);
  EXPECT_THROW(runs_of({4, 6}, 4, 2, 0, 1), InternalError);
  EXPECT_THROW(runs_of({4, 6}, 4, 0, 3, 2), InternalError);
  EXPECT_THROW(runs_of({4, 6}, 0, 0, 0, 1), InternalError);
}

}  // namespace
}  // namespace regroup
