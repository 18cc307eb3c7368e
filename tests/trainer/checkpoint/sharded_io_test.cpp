#include "trainer/checkpoint/sharded_io.h"

#include <deque>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "kernels/base/file.h"
#include "kernels/base/random.h"
#include "tests/trainer/checkpoint/plain_file.h"
#include "tests/trainer/checkpoint/shared_directory.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

using test::refusal;
using test::SharedDirectory;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

ModelConfig small_model() {
  ModelConfig config;
  config.vocab_size = 40;
  config.d_model = 12;
  config.d_kv = 3;
  config.d_ff = 20;
  config.num_heads = 4;
  config.num_layers = 1;
  config.num_decoder_layers = 2;
  config.kv_groups = 2;
  config.encoder_kv_groups = 4;
  return config;
}

// The global value of element `i` of a parameter: any function of both will do.
float value_of(const std::string& name, index_t i) {
  return static_cast<float>(key_of(name) % 1000) + 0.25F * static_cast<float>(i % 4096);
}

// One rank's slices of a table, filled with the global values.
struct Slices {
  Slices(const std::vector<ParameterSpec>& table, int tp_rank, int tp_size) {
    for (const ParameterSpec& spec : table) {
      const Slice slice = local_slice(spec.partition, spec.shape, tp_rank, tp_size);
      const auto shape = local_shape(slice, spec.shape);
      const index_t count = std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies<>());
      auto& memory = memories.emplace_back(static_cast<std::size_t>(count));
      const index_t width = shape.size() == 2 ? shape[1] : 1;
      const index_t global_width = shape.size() == 2 ? spec.shape[1] : 1;
      for (index_t i = 0; i < count; ++i) {
        const index_t row = i / width + (slice.dim == 0 ? slice.begin : 0);
        const index_t column = i % width + (slice.dim == 1 ? slice.begin : 0);
        memory[static_cast<std::size_t>(i)] = value_of(spec.name, row * global_width + column);
      }
      tensors.push_back({.name = spec.name,
                         .shape = spec.shape,
                         .slice = slice,
                         .local = Tensor(memory.data(), DType::kFloat32, shape)});
    }
  }
  std::deque<std::vector<float>> memories;
  std::vector<ShardedTensor> tensors;
};

// Writes the model in a dp x tp layout of the world's ranks; returns the names of the files.
std::vector<std::string> write_model(const std::filesystem::path& directory, const std::string& stem, int tp,
                                     const WriteOptions& options = {}) {
  const ProcessGroup world = ProcessGroup::world();
  const Slices slices(parameter_table(small_model()), world.rank() % tp, tp);
  world.run_on(0, [&] { regroup::create_directories(directory); });
  return write_tensors(world, directory, stem, slices.tensors, world.rank() / tp == 0, options);
}

TEST(WriteTensors, TheSameBytesInEveryLayout) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  // What one rank would write, made without MPI-IO.
  std::vector<test::PlainTensor> whole;
  const Slices all(parameter_table(small_model()), 0, 1);
  for (std::size_t i = 0; i < all.tensors.size(); ++i) {
    whole.push_back(test::plain_tensor(all.tensors[i].name, all.tensors[i].shape, all.memories[i]));
  }
  std::vector<StoredTensor> table;
  for (const auto& t : whole) table.push_back({.name = t.name, .type = t.type, .shape = t.shape});
  std::string expected = plan_safetensors(table, {{"format", "pt"}}).bytes;
  for (const auto& t : whole) expected += t.bytes;
  for (int tp = 1; tp <= world.size(); tp *= 2) {
    const std::string stem = fmt::format("tp{}", tp);
    EXPECT_THAT(write_model(directory.path(), stem, tp), ElementsAre(stem + ".safetensors"));
    EXPECT_EQ(read_text(directory / (stem + ".safetensors")), expected) << tp;
  }
}

TEST(WriteTensors, SplitsIntoFilesOfLimitedSize) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  constexpr std::uint64_t kLimit = 3000;
  for (int tp = 1; tp <= world.size(); tp *= 2) {
    const auto where = directory / fmt::format("tp{}", tp);
    const auto names = write_model(where, "model", tp, {.metadata = {}, .max_file_bytes = kLimit});
    ASSERT_GE(names.size(), 3U);
    EXPECT_EQ(names.back(), "model.safetensors.index.json");
    EXPECT_EQ(names[0], fmt::format("model-00001-of-{:05}.safetensors", names.size() - 1));
    for (const std::string& name : names) {
      EXPECT_EQ(read_text(where / name), read_text(directory / "tp1" / name)) << name;
    }
    const CheckpointReader reader(where);
    reader.require(parameter_table(small_model()));
    std::map<std::string, std::uint64_t> filled;
    const auto index = nlohmann::json::parse(read_text(where / names.back()));
    std::uint64_t total = 0;
    for (const StoredTensor* t : reader.tensors()) {
      filled[index["weight_map"][t->name]] += t->end - t->begin;
      total += t->end - t->begin;
    }
    EXPECT_EQ(index["metadata"]["total_size"], total);
    EXPECT_EQ(filled.size(), names.size() - 1);
    // 40 x 12 floats fit; nothing here is larger than a file may be.
    for (const auto& [name, bytes] : filled) EXPECT_LE(bytes, kLimit) << name;
  }
}

TEST(WriteTensors, AnyLayoutReadsWhatAnyOtherWrote) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  write_model(directory.path(), "model", world.size());
  const CheckpointReader reader(directory.path());
  const auto table = parameter_table(small_model());
  reader.require(table);
  for (const int tp : {1, 2, 4}) {
    for (int rank = 0; rank < tp; ++rank) {
      Slices slices(table, rank, tp);
      const auto expected = slices.memories;
      for (auto& memory : slices.memories) std::fill(memory.begin(), memory.end(), -1.0F);
      for (const ShardedTensor& t : slices.tensors) reader.read(t);
      EXPECT_EQ(slices.memories, expected) << tp << " " << rank;
    }
  }
}

// Slices may belong to any rank of the group, and a tensor that a rank does not hold is left empty.
TEST(WriteTensors, OwnersMayDifferFromTensorToTensor) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  std::vector<ShardedTensor> tensors;
  std::vector<float> memory = {1, 2, 3};
  std::vector<double> scalar = {0.5};
  for (int i = 0; i < 5; ++i) {
    ShardedTensor t = {
        .name = fmt::format("t{}", i), .shape = {3}, .slice = {.dim = 0, .begin = 0, .end = 3}};
    if (i % world.size() == world.rank()) t.local = Tensor(memory.data(), DType::kFloat32, {3});
    tensors.push_back(t);
  }
  ShardedTensor count = {
      .name = "count", .shape = {}, .slice = {}, .local = Tensor(nullptr, DType::kFloat64, {})};
  if (world.rank() == world.size() - 1) count.local.data = scalar.data();
  tensors.push_back(count);
  tensors.push_back({.name = "empty", .shape = {0, 3}, .slice = {}, .local = {}});
  write_tensors(world, directory.path(), "optimizer", tensors, true);
  const CheckpointReader reader(directory.path(), "optimizer");
  reader.require(tensors);
  double found = 0;
  reader.read("count", 0, 0, 0, Tensor(&found, DType::kFloat64, {}));
  EXPECT_EQ(found, 0.5);
  std::vector<float> back(3);
  reader.read("t4", 0, 0, 3, Tensor(back.data(), DType::kFloat32, {3}));
  EXPECT_EQ(back, memory);
}

TEST(WriteTensors, RefusesWhatDoesNotCoverOnEveryRank) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  std::vector<float> memory(4);
  const ShardedTensor mine = {.name = "t",
                              .shape = {4},
                              .slice = {.dim = 0, .begin = 0, .end = 4},
                              .local = Tensor(memory.data(), DType::kFloat32, {4})};
  // Nobody writes it.
  EXPECT_THROW(write_tensors(world, directory.path(), "none", std::vector{mine}, false), InternalError);
  // The same names, but other shapes on the last rank: found where there is another rank to differ from.
  if (world.size() > 1) {
    auto other = mine;
    if (world.rank() == world.size() - 1) other.name = "u";
    EXPECT_THROW(write_tensors(world, directory.path(), "other", std::vector{other}, world.rank() == 0),
                 InternalError);
    // Everybody writes it.
    EXPECT_THROW(write_tensors(world, directory.path(), "all", std::vector{mine}, true), InternalError);
  }
  // A local tensor that is not the slice, on one rank only.
  auto bent = mine;
  if (world.rank() == world.size() - 1) bent.local = Tensor(memory.data(), DType::kFloat32, {2, 2});
  EXPECT_THROW(
      write_tensors(world, directory.path(), "bent", std::vector{bent}, world.rank() == world.size() - 1),
      InternalError);
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(WriteTensors, SaysOnEveryRankWhereItCannotWrite) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  const Slices slices(parameter_table(small_model()), 0, 1);
  EXPECT_THAT(refusal([&] {
                write_tensors(world, directory / "absent", "model", slices.tensors, world.rank() == 0);
              }),
              HasSubstr("absent"));
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
