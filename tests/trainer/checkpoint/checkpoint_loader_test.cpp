#include "trainer/checkpoint/checkpoint_loader.h"

#include <deque>
#include <fstream>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/json.h"
#include "kernels/base/random.h"
#include "kernels/make_backend.h"
#include "kernels/plan_backend.h"
#include "tests/trainer/checkpoint/shared_directory.h"
#include "tests/trainer/formats/plain_file.h"
#include "trainer/checkpoint/checkpoint_writer.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

using test::refusal;
using test::SharedDirectory;
using testing::HasSubstr;

// G < tp at some attentions and G >= tp at others, for 2 and for 4 ranks.
ModelConfig model() {
  ModelConfig config;
  config.vocab_size = 40;
  config.d_model = 12;
  config.d_kv = 3;
  config.d_ff = 20;
  config.num_heads = config.encoder_kv_groups = 4;
  config.num_layers = 1;
  config.num_decoder_layers = 2;
  config.kv_groups = 2;
  config.site_kv_groups = {4, 1, 2, 1};
  return config;
}

// The global value of element `i` of a tensor: any function of both will do.
double value_of(const std::string& name, index_t i) {
  return static_cast<double>(key_of(name) % 1000) + 0.25 * static_cast<double>(i % 4096);
}

// A host's memory that says that the host may not touch it, and counts what is copied.
class UntouchableBackend : public PlanBackend {
 public:
  Buffer allocate(index_t bytes) override { return owned_->allocate(bytes); }
  bool host_accessible() const override { return false; }
  void copy_from_host(const void* host, Tensor tensor) override {
    copied += tensor.bytes();
    owned_->copy_from_host(host, tensor);
  }
  index_t copied = 0;

 private:
  std::unique_ptr<Backend> owned_ = make_backend({.threads = 1});
};

// One rank's slices of a model and of something like its optimizer's state.
class State {
 public:
  State(int tp_rank, int tp_size, DType dtype = DType::kFloat32) : dtype_(dtype) {
    for (const ParameterSpec& spec : parameter_table(model())) {
      const Slice slice = local_slice(spec.partition, spec.shape, tp_rank, tp_size);
      add(sets[0], spec.name, spec.shape, slice);
      // Of one dimension, and whole on every rank, as factored moments are.
      const Slice whole = {
          .dim = 0, .begin = 0, .end = spec.shape.back(), .replica = tp_rank, .replicas = tp_size};
      add(sets[1], spec.name + ".moment", {spec.shape.back()}, whole);
    }
    add(sets[1], "scalar", {}, {.replica = tp_rank, .replicas = tp_size});
  }

  std::vector<TensorSet> sets = {{.stem = "model", .tensors = {}}, {.stem = "optimizer", .tensors = {}}};

  void fill() {
    for_each([](double& value, double expected) { value = expected; });
  }
  void clear() {
    for_each([](double& value, double) { value = -1; });
  }
  bool filled() {
    bool all = true;
    for_each([&](double& value, double expected) { all = all && value == expected; });
    return all;
  }

 private:
  void add(TensorSet& set, const std::string& name, const std::vector<index_t>& shape, const Slice& slice) {
    const auto local = local_shape(slice, shape);
    const index_t count = std::accumulate(local.begin(), local.end(), size_of(dtype_), std::multiplies<>());
    auto& memory = memories_.emplace_back(static_cast<std::size_t>(count));
    set.tensors.push_back(
        {.name = name, .shape = shape, .slice = slice, .local = Tensor(memory.data(), dtype_, local)});
  }
  template <class T, class Work>
  static void for_each_of(const ShardedTensor& tensor, Work&& work) {
    const index_t width = tensor.shape.size() == 2 ? tensor.local.shape[1] : 1;
    const index_t global_width = tensor.shape.size() == 2 ? tensor.shape[1] : 1;
    for (index_t i = 0; i < tensor.local.numel(); ++i) {
      const index_t row = i / width + (tensor.slice.dim == 0 ? tensor.slice.begin : 0);
      const index_t column = i % width + (tensor.slice.dim == 1 ? tensor.slice.begin : 0);
      auto value = static_cast<double>(tensor.local.as<T>()[i]);
      work(value, value_of(tensor.name, row * global_width + column));
      tensor.local.as<T>()[i] = static_cast<T>(value);
    }
  }
  template <class Work>
  void for_each(Work&& work) {
    for (const TensorSet& set : sets) {
      for (const ShardedTensor& tensor : set.tensors) {
        if (dtype_ == DType::kFloat64) {
          for_each_of<double>(tensor, work);
        } else {
          for_each_of<float>(tensor, work);
        }
      }
    }
  }

  DType dtype_;
  std::deque<std::vector<std::byte>> memories_;
};

class CheckpointLoaderTest : public testing::Test {
 protected:
  Layout layout(int tp) const { return {.data_parallel = world_.size() / tp, .tensor_parallel = tp}; }
  State state(int tp, DType dtype = DType::kFloat32) const { return {world_.rank() % tp, tp, dtype}; }
  // Every layout of the world's ranks.
  std::vector<int> layouts() const {
    std::vector<int> result;
    for (int tp = 1; tp <= world_.size(); tp *= 2) result.push_back(tp);
    return result;
  }
  std::filesystem::path save(const std::string& run, int tp, const CheckpointWriter::Options& options,
                             DType dtype = DType::kFloat32) {
    const CheckpointStore steps(world_, directory_ / run);
    steps.prepare();
    State mine = state(tp, dtype);
    mine.fill();
    CheckpointWriter writer(world_, layout(tp), backend_, steps, mine.sets, options);
    writer.save(1, {{"step", 1}}, {{"config.json", "{}"}});
    writer.finish();
    return steps.path_of(1);
  }
  std::optional<std::string> load(const std::filesystem::path& step, int tp, State& into) {
    into.clear();
    return load_step(world_, layout(tp), backend_, step, into.sets);
  }
  // Rank 0 changes a file, and all see it.
  void flip(const std::filesystem::path& file, std::uint64_t at) const {
    world_.barrier();
    world_.run_on(0, [&] {
      std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
      stream.seekg(static_cast<std::streamoff>(at));
      const auto byte = static_cast<char>(stream.get() ^ 4);
      stream.seekp(static_cast<std::streamoff>(at));
      stream.put(byte);
      check(stream.good(), "a test cannot change {}", file.string());
    });
  }

  ProcessGroup world_ = ProcessGroup::world();
  SharedDirectory directory_{world_};
  std::unique_ptr<Backend> owned_ = make_backend({.threads = 1});
  Backend& backend_ = *owned_;
};

TEST_F(CheckpointLoaderTest, AnyLayoutLoadsWhatAnyOtherSaved) {
  for (const std::uint64_t block :
       {std::uint64_t{64}, std::uint64_t{1000}, std::uint64_t{4096}, kChecksumBlock}) {
    for (const std::uint64_t limit : {std::uint64_t{3000}, std::uint64_t{1} << 40}) {
      for (const int saved : layouts()) {
        const auto step = save(fmt::format("{}-{}-{}", block, limit, saved), saved,
                               {.block_bytes = block, .files = {.metadata = {}, .max_file_bytes = limit}});
        for (const int tp : layouts()) {
          State mine = state(tp);
          EXPECT_EQ(load(step, tp, mine), std::nullopt);
          EXPECT_TRUE(mine.filled()) << "blocks of " << block << ", saved by " << saved << ", loaded by "
                                     << tp;
        }
      }
    }
  }
}

TEST_F(CheckpointLoaderTest, MemoryThatIsLentIsUsedOrNot) {
  const int tp = world_.size();
  const auto step = save("run", tp, {.block_bytes = 512});
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{5000}, std::size_t{1} << 20}) {
    std::vector<std::byte> lent(bytes);
    State mine = state(tp);
    mine.clear();
    EXPECT_EQ(load_step(world_, layout(tp), backend_, step, mine.sets, lent), std::nullopt);
    EXPECT_TRUE(mine.filled()) << bytes;
  }
}

// Every byte that a rank holds is copied once, whatever the host may touch.
TEST_F(CheckpointLoaderTest, FillsADeviceThatTheHostCannotTouch) {
  for (const int tp : layouts()) {
    const auto step = save(fmt::format("run{}", tp), tp, {.block_bytes = 200});
    State mine = state(tp);
    mine.clear();
    UntouchableBackend device;
    EXPECT_EQ(load_step(world_, layout(tp), device, step, mine.sets), std::nullopt);
    EXPECT_TRUE(mine.filled()) << tp;
    index_t expected = 0;
    for (const ShardedTensor& tensor : all_tensors(mine.sets)) expected += tensor.local.bytes();
    EXPECT_EQ(device.copied, expected) << tp;
  }
}

TEST_F(CheckpointLoaderTest, AFlippedBitAnywhereIsFoundAndNamed) {
  const int tp = world_.size();
  const auto step = save("run", tp, {.block_bytes = 512, .files = {.metadata = {}, .max_file_bytes = 3000}});
  int files = 0;
  const nlohmann::json recorded = step_state(world_, step)["files"];
  for (const auto& [name, entry] : recorded.items()) {
    if (!name.ends_with(".safetensors")) continue;
    ++files;
    const std::uint64_t size = std::filesystem::file_size(step / name);
    // The header's length, its first and other bytes, the data's first and last, and some between.
    for (const std::uint64_t at : {std::uint64_t{1}, std::uint64_t{8}, std::uint64_t{9}, std::uint64_t{40},
                                   size / 3, size / 2, size - 1}) {
      flip(step / name, at);
      for (const int loaded : {1, tp}) {
        State mine = state(loaded);
        const auto damage = load(step, loaded, mine);
        EXPECT_EQ(damage, find_damage(world_, step)) << name << " at " << at << " by " << loaded;
        EXPECT_THAT(damage.value_or("none"), testing::AllOf(HasSubstr(name), HasSubstr("its checksum is")));
      }
      flip(step / name, at);
    }
  }
  EXPECT_GE(files, 5);
  State mine = state(tp);
  EXPECT_EQ(load(step, tp, mine), std::nullopt);
  EXPECT_TRUE(mine.filled());
}

TEST_F(CheckpointLoaderTest, WhatIsShortenedOrGoneIsNamed) {
  const int tp = world_.size();
  const auto step = save("run", tp, {.block_bytes = 512});
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{5}, std::uint64_t{3000}}) {
    world_.barrier();
    world_.run_on(0, [&] { std::filesystem::resize_file(step / "model.safetensors", bytes); });
    State mine = state(tp);
    EXPECT_THAT(load(step, tp, mine).value_or("none"), HasSubstr("model.safetensors is damaged: it has"))
        << bytes;
  }
  world_.barrier();
  world_.run_on(0, [&] { std::filesystem::remove(step / "model.safetensors"); });
  State mine = state(tp);
  EXPECT_THAT(load(step, tp, mine).value_or("none"), HasSubstr("model.safetensors is missing"));
}

// Intact, but of another model: no damage, and nothing to fall back from.
TEST_F(CheckpointLoaderTest, OtherTensorsAreRefused) {
  const int tp = world_.size();
  const auto step = save("run", tp, {});
  State other = state(tp);
  other.sets[0].tensors[0].name = "unknown.weight";
  EXPECT_THAT(refusal([&] { load(step, tp, other); }), HasSubstr("unknown.weight"));
}

// As the tests in float64 do; the other way round too.
TEST_F(CheckpointLoaderTest, OtherTypesAreConverted) {
  const int tp = world_.size();
  for (const DType saved : {DType::kFloat32, DType::kFloat64}) {
    const auto step = save(fmt::format("run{}", size_of(saved)), tp, {.block_bytes = 512}, saved);
    for (const DType loaded : {DType::kFloat32, DType::kFloat64}) {
      State mine = state(tp, loaded);
      EXPECT_EQ(load(step, tp, mine), std::nullopt);
      EXPECT_TRUE(mine.filled()) << size_of(saved) << " " << size_of(loaded);
    }
    flip(step / "optimizer.safetensors", 2000);
    State mine = state(tp, DType::kFloat64);
    EXPECT_THAT(load(step, tp, mine).value_or("none"), HasSubstr("optimizer.safetensors is damaged"));
  }
}

}  // namespace
}  // namespace regroup
