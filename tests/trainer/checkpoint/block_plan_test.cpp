#include "trainer/checkpoint/block_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

using testing::HasSubstr;

// A model as the ranks of a tensor-parallel group hold it.
struct Held {
  Held(const ModelConfig& config, int tp_size) {
    TensorSet set{.stem = "model", .tensors = {}};
    for (const ParameterSpec& spec : parameter_table(config)) {
      HeldTensor& tensor = held.emplace_back();
      for (int rank = 0; rank < tp_size; ++rank) {
        const Slice slice = local_slice(spec.partition, spec.shape, rank, tp_size);
        tensor.gives.push_back(slice.replica == 0);
        tensor.runs.push_back(runs_of(spec.shape, 4, slice.dim, slice.begin, slice.end));
      }
      set.tensors.push_back({.name = spec.name, .shape = spec.shape, .slice = {}, .local = {}});
      set.tensors.back().local.dtype = DType::kFloat32;
    }
    files = plan_files(std::vector{set}, {.max_file_bytes = 3'000'000});
  }
  FilePlan files;
  std::vector<HeldTensor> held;
};

ModelConfig model() {
  ModelConfig config;
  config.vocab_size = 512;
  config.d_model = 128;
  config.d_kv = 16;
  config.d_ff = 256;
  config.num_heads = config.encoder_kv_groups = 8;
  config.num_layers = config.num_decoder_layers = 3;
  config.kv_groups = 2;
  return config;
}

TEST(BlockPlan, EveryByteHasOneWriterAndTheWorkIsShared) {
  constexpr std::uint64_t kBlock = 4096;
  for (const Layout layout : {Layout{1, 1}, Layout{4, 1}, Layout{1, 4}, Layout{2, 2}, Layout{3, 8}}) {
    const Held held(model(), layout.tensor_parallel);
    ASSERT_GT(held.files.files.size(), 1U);
    const auto blocks = plan_blocks(held.files, held.held, layout, kBlock);
    std::size_t file = 0;
    std::uint64_t end = 0;
    std::map<std::pair<int, int>, std::vector<std::size_t>> slots;
    for (const Block& block : blocks) {
      if (block.file != file) {
        EXPECT_EQ(end, held.files.files[file].bytes);
        EXPECT_EQ(block.file, ++file);
        end = 0;
      }
      EXPECT_EQ(block.begin, end);
      EXPECT_LE(block.bytes, kBlock);
      end += block.bytes;
      slots[{block.dp_rank, block.tp_rank}].push_back(block.slot);
    }
    EXPECT_EQ(end, held.files.files[file].bytes);
    const auto ranks = static_cast<std::size_t>(layout.ranks());
    ASSERT_EQ(slots.size(), ranks);
    for (const auto& [rank, mine] : slots) {
      for (std::size_t i = 0; i < mine.size(); ++i) EXPECT_EQ(mine[i], i);
      EXPECT_LE(mine.size(), blocks.size() / ranks * 5 / 4 + 2) << "of " << blocks.size();
    }
  }
}

TEST(BlockPlan, PartsOfABlockAreThoseOfItsTensors) {
  const Held held(model(), 1);
  std::vector<std::uint64_t> seen(held.held.size());
  for (const Block& block : plan_blocks(held.files, held.held, Layout{1, 1}, 1000)) {
    std::uint64_t covered =
        block.begin < held.files.files[block.file].header.size()
            ? std::min(held.files.files[block.file].header.size() - block.begin, block.bytes)
            : 0;
    for_each_part(held.files, block,
                  [&](std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::uint64_t at) {
                    EXPECT_EQ(begin, seen[tensor]);
                    EXPECT_EQ(at, covered);
                    seen[tensor] = end;
                    covered += end - begin;
                  });
    EXPECT_EQ(covered, block.bytes);
  }
  for (std::size_t i = 0; i < seen.size(); ++i) EXPECT_EQ(seen[i], held.held[i].runs[0].bytes);
}

// Whoever writes a part gets each byte of it once.
TEST(BlockPlan, SlicesComeFromOneHolderEach) {
  for (const int tp : {1, 2, 4, 8}) {
    const Held held(model(), tp);
    for (const HeldTensor& tensor : held.held) {
      for (std::size_t writer = 0; writer < static_cast<std::size_t>(tp); ++writer) {
        std::uint64_t bytes = 0;
        for (std::size_t source = 0; source < static_cast<std::size_t>(tp); ++source) {
          if (tensor.gives_to(source, writer)) bytes += tensor.runs[source].count * tensor.runs[source].bytes;
        }
        EXPECT_EQ(bytes, tensor.runs[0].stride * tensor.runs[0].count);
      }
    }
  }
}

std::string cover_fault(const std::vector<index_t>& shape, const std::vector<Contribution>& contributions) {
  const std::vector<ShardedTensor> table = {{.name = "a", .shape = {2}, .slice = {}, .local = {}},
                                            {.name = "b", .shape = shape, .slice = {}, .local = {}}};
  auto all = contributions;
  all.push_back({.rank = 9, .tensor = 0, .dim = 0, .begin = 0, .end = 2});
  try {
    check_exact_cover(table, all);
  } catch (const InternalError& error) {
    return error.what();
  }
  return "covered";
}

TEST(ExactCover, FindsEveryKindOfFault) {
  const auto part = [](int rank, int dim, index_t begin, index_t end) {
    return Contribution{.rank = rank, .tensor = 1, .dim = dim, .begin = begin, .end = end};
  };
  EXPECT_EQ(cover_fault({4, 6}, {part(0, 0, 0, 4)}), "covered");
  EXPECT_EQ(cover_fault({4, 6}, {part(1, 1, 3, 6), part(0, 1, 0, 3)}), "covered");
  EXPECT_EQ(cover_fault({0, 6}, {}), "covered");
  EXPECT_EQ(cover_fault({}, {part(0, 0, 0, 1)}), "covered");
  EXPECT_THAT(cover_fault({4, 6}, {}), HasSubstr("[0, 4) of dimension 0 of 'b' is written by no rank"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 1, 0, 3), part(1, 1, 4, 6)}),
              HasSubstr("[3, 4) of dimension 1 of 'b'"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 1, 0, 3)}),
              HasSubstr("[3, 6) of dimension 1 of 'b' is written by no"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 1, 0, 4), part(1, 1, 3, 6)}),
              HasSubstr("rank 1, is written by another"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 0, 0, 4), part(1, 0, 0, 4)}),
              HasSubstr("written by another rank too"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 0, 0, 2), part(1, 1, 0, 6)}), HasSubstr("along"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 0, 0, 5)}),
              HasSubstr("[0, 5) of dimension 0 of 'b', which has 4"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 2, 0, 5)}), HasSubstr("no dimension 2"));
  EXPECT_THAT(cover_fault({4, 6}, {part(0, 0, 0, 4), Contribution{.rank = 0, .tensor = 7}}),
              HasSubstr("tensor number 7"));
}

}  // namespace
}  // namespace regroup
