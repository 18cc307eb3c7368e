#include "trainer/checkpoint/checkpoint_writer.h"

#include <csignal>
#include <deque>
#include <numeric>
#include <sys/resource.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "kernels/base/random.h"
#include "kernels/make_backend.h"
#include "tests/trainer/checkpoint/shared_directory.h"
#include "tests/trainer/formats/plain_file.h"
#include "trainer/formats/checkpoint_reader.h"
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

// G < tp at some attentions and G >= tp at others, for 2 and for 4 ranks.
ModelConfig uneven_model() {
  ModelConfig config = small_model();
  config.site_kv_groups = {4, 1, 2, 1};
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

// Saves in a dp x tp layout of the world's ranks.
class CheckpointWriterTest : public testing::Test {
 protected:
  using Options = CheckpointWriter::Options;

  Layout layout(int tp) const { return {.data_parallel = world_.size() / tp, .tensor_parallel = tp}; }
  CheckpointStore store(const std::string& run) const { return CheckpointStore(world_, directory_ / run); }
  std::unique_ptr<CheckpointWriter> writer(const CheckpointStore& store, const Slices& slices, int tp,
                                           const Options& options) {
    const std::vector<TensorSet> sets = {{.stem = "model", .tensors = slices.tensors}};
    return std::make_unique<CheckpointWriter>(world_, layout(tp), *backend_, store, sets, options);
  }
  Slices slices(int tp, const ModelConfig& config = small_model()) const {
    return Slices(parameter_table(config), world_.rank() % tp, tp);
  }
  CheckpointStore save_model(const std::string& run, int tp, const Options& options) {
    const CheckpointStore steps = store(run);
    steps.prepare();
    const Slices mine = slices(tp);
    const auto saver = writer(steps, mine, tp, options);
    saver->save(1, {{"step", 1}}, {{"config.json", "{}"}});
    EXPECT_TRUE(saver->pending());
    EXPECT_EQ(saver->finish(), 1);
    EXPECT_FALSE(saver->pending());
    return steps;
  }
  // What one rank would write, made by hand.
  static std::string whole_file() {
    std::vector<StoredTensor> table;
    std::string data;
    const Slices all(parameter_table(small_model()), 0, 1);
    for (std::size_t i = 0; i < all.tensors.size(); ++i) {
      const auto tensor = test::plain_tensor(all.tensors[i].name, all.tensors[i].shape, all.memories[i]);
      table.push_back({.name = tensor.name, .type = tensor.type, .shape = tensor.shape});
      data += tensor.bytes;
    }
    return plan_safetensors(table, {{"format", "pt"}}).bytes + data;
  }

  ProcessGroup world_ = ProcessGroup::world();
  SharedDirectory directory_{world_};
  std::unique_ptr<Backend> backend_ = make_backend({.threads = 1});
};

// Blocks that cut tensors anywhere, with staging memory for all of a rank's or for one at a time.
TEST_F(CheckpointWriterTest, TheSameBytesInEveryLayout) {
  const std::string expected = whole_file();
  for (int tp = 1; tp <= world_.size(); tp *= 2) {
    for (const std::uint64_t block : {std::uint64_t{64}, std::uint64_t{1000}, kChecksumBlock}) {
      for (const std::uint64_t blocks_held : {0, 1, 3}) {
        const std::string run = fmt::format("tp{}-{}-{}", tp, block, blocks_held);
        const CheckpointStore steps =
            save_model(run, tp, {.memory = blocks_held * block, .block_bytes = block});
        EXPECT_TRUE(read_text(steps.path_of(1) / "model.safetensors") == expected) << run;
        EXPECT_EQ(find_damage(world_, steps.path_of(1)), std::nullopt) << run;
        EXPECT_EQ(step_state(world_, steps.path_of(1))["step"], 1);
      }
    }
  }
}

TEST_F(CheckpointWriterTest, SplitsIntoFilesOfLimitedSize) {
  constexpr std::uint64_t kLimit = 3000;
  std::map<std::string, std::string> first;
  for (int tp = 1; tp <= world_.size(); tp *= 2) {
    const CheckpointStore steps =
        save_model(fmt::format("tp{}", tp), tp,
                   {.block_bytes = 512, .files = {.metadata = {}, .max_file_bytes = kLimit}});
    const std::filesystem::path where = steps.path_of(1);
    const auto index = nlohmann::json::parse(read_text(where / "model.safetensors.index.json"));
    const CheckpointReader reader(where);
    reader.require(parameter_table(small_model()));
    std::map<std::string, std::uint64_t> filled;
    std::uint64_t total = 0;
    for (const StoredTensor* t : reader.tensors()) {
      filled[index["weight_map"][t->name]] += t->end - t->begin;
      total += t->end - t->begin;
    }
    EXPECT_EQ(index["metadata"]["total_size"], total);
    ASSERT_GE(filled.size(), 3U);
    for (const auto& [name, bytes] : filled) {
      EXPECT_LE(bytes, kLimit) << name;  // no tensor is larger than a file may be
      const std::string text = read_text(where / name);
      EXPECT_EQ(first.emplace(name, text).first->second, text) << name;
    }
    EXPECT_EQ(filled.begin()->first, fmt::format("model-00001-of-{:05}.safetensors", filled.size()));
    EXPECT_EQ(find_damage(world_, where), std::nullopt);
  }
}

TEST_F(CheckpointWriterTest, AnyLayoutReadsWhatAnyOtherWrote) {
  const CheckpointStore steps = save_model("run", world_.size(), {.block_bytes = 200});
  const CheckpointReader reader(steps.path_of(1));
  const auto table = parameter_table(small_model());
  reader.require(table);
  for (const int tp : {1, 2, 4}) {
    for (int rank = 0; rank < tp; ++rank) {
      Slices read(table, rank, tp);
      const auto expected = read.memories;
      for (auto& memory : read.memories) std::fill(memory.begin(), memory.end(), -1.0F);
      for (const ShardedTensor& t : read.tensors) reader.read(t);
      EXPECT_EQ(read.memories, expected) << tp << " " << rank;
    }
  }
}

// From nothing but the files: the configuration says what each attention has.
TEST_F(CheckpointWriterTest, AnUnevenModelIsReadInAnyLayout) {
  for (int tp = 1; tp <= world_.size(); tp *= 2) {
    const CheckpointStore steps = store(fmt::format("uneven{}", tp));
    steps.prepare();
    const Slices mine = slices(tp, uneven_model());
    const auto saver = writer(steps, mine, tp, {.block_bytes = 200});
    saver->save(1, {{"step", 1}}, {{"config.json", to_json(uneven_model())}});
    EXPECT_EQ(saver->finish(), 1);
    const ModelConfig config =
        model_config_from_json(read_text(steps.path_of(1) / "config.json"), "config.json");
    EXPECT_EQ(config, uneven_model());
    const auto table = parameter_table(config);
    const CheckpointReader reader(steps.path_of(1));
    reader.require(table);
    EXPECT_NE(refusal([&] {
                reader.require(parameter_table(small_model()));
              }).find("decoder.block.0.layer.0.SelfAttention.k.weight"),
              std::string::npos);
    for (const int ranks : {1, 2, 4}) {
      for (int rank = 0; rank < ranks; ++rank) {
        Slices read(table, rank, ranks);
        const auto expected = read.memories;
        for (auto& memory : read.memories) std::fill(memory.begin(), memory.end(), -1.0F);
        for (const ShardedTensor& t : read.tensors) reader.read(t);
        EXPECT_EQ(read.memories, expected) << tp << " " << ranks << " " << rank;
      }
    }
  }
}

// Training goes on while the files are written: what it changes is not in them.
TEST_F(CheckpointWriterTest, SavesWhatTheTensorsWereAtTheCall) {
  const CheckpointStore steps = store("run");
  steps.prepare();
  Slices mine = slices(world_.size());
  const auto saver = writer(steps, mine, world_.size(), {.keep_last = 2, .block_bytes = 512});
  const std::uint64_t reserved = saver->staging_bytes();
  for (const index_t step : {1, 2, 3}) {
    saver->save(step, {{"step", step}}, {});
    for (auto& memory : mine.memories) {
      for (float& value : memory) value += 1;
    }
    while (saver->pending()) saver->advance();
  }
  EXPECT_EQ(saver->staging_bytes(), reserved);
  EXPECT_THAT(steps.steps(), ElementsAre(2, 3));
  const Slices before = slices(world_.size());
  for (const index_t step : {2, 3}) {
    const CheckpointReader reader(steps.path_of(step));
    Slices read = slices(world_.size());
    for (const ShardedTensor& t : read.tensors) reader.read(t);
    for (std::size_t i = 0; i < read.memories.size(); ++i) {
      for (std::size_t j = 0; j < read.memories[i].size(); ++j) {
        ASSERT_EQ(read.memories[i][j], before.memories[i][j] + static_cast<float>(step - 1));
      }
    }
  }
}

// Nothing is there before the commit, and what was under way is gone where nobody finishes it.
TEST_F(CheckpointWriterTest, AStepAppearsWithItsLastPhase) {
  const CheckpointStore steps = store("run");
  steps.prepare();
  const Slices mine = slices(1);
  auto saver = writer(steps, mine, 1, {});
  EXPECT_EQ(saver->finish(), std::nullopt);
  EXPECT_EQ(saver->advance(), std::nullopt);
  saver->save(7, {{"step", 7}}, {});
  EXPECT_THAT(steps.steps(), testing::IsEmpty());
  EXPECT_EQ(saver->advance(), std::nullopt);
  EXPECT_TRUE(saver->pending());
  EXPECT_EQ(saver->advance(), 7);
  EXPECT_THAT(steps.steps(), ElementsAre(7));
  saver->save(8, {{"step", 8}}, {});
  saver.reset();
  world_.barrier();
  EXPECT_THAT(steps.steps(), ElementsAre(7));
  EXPECT_FALSE(std::filesystem::exists(steps.partial_path_of(8)));
  EXPECT_EQ(find_damage(world_, steps.path_of(7)), std::nullopt);
}

// What the slices say must be one model, on every rank the same.
TEST_F(CheckpointWriterTest, RefusesWhatDoesNotCoverOnEveryRank) {
  const CheckpointStore steps = store("run");
  std::vector<float> memory(4);
  const ShardedTensor whole = {.name = "t",
                               .shape = {4},
                               .slice = {.dim = 0, .begin = 0, .end = 4},
                               .local = Tensor(memory.data(), DType::kFloat32, {4})};
  const int last = world_.size() - 1;
  const auto refused = [&](const ShardedTensor& tensor) {
    const std::vector<TensorSet> sets = {{.stem = "model", .tensors = {tensor}}};
    EXPECT_THROW(CheckpointWriter(world_, layout(world_.size()), *backend_, steps, sets, {}), InternalError);
  };
  if (world_.size() > 1) {
    refused(whole);  // everybody says that it gives all of it
    ShardedTensor other = whole;
    if (world_.rank() == last) other.name = "u";
    refused(other);
  }
  ShardedTensor nobody = whole;
  nobody.slice.replica = 1;
  refused(nobody);
  ShardedTensor bent = whole;
  if (world_.rank() == last) bent.local = Tensor(memory.data(), DType::kFloat32, {2, 2});
  refused(bent);
}

TEST_F(CheckpointWriterTest, AFailedSaveIsTheSameErrorOnEveryRankAndLeavesOlderStepsAlone) {
  const CheckpointStore steps = save_model("run", 1, {});
  const Slices mine = slices(1);
  const auto saver = writer(steps, mine, 1, {.block_bytes = 512});
  const auto save_limited = [&](bool limited) {
    rlimit before{};
    EXPECT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const rlimit small = {.rlim_cur = 1024, .rlim_max = before.rlim_max};
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // as main() does
    if (limited) {
      EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    }
    const std::string message = refusal([&] {
      saver->save(2, {{"step", 2}}, {});
      saver->finish();
    });
    EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    std::signal(SIGXFSZ, handler);
    EXPECT_THAT(message, AllOf(HasSubstr("cannot write"), HasSubstr("model.safetensors"),
                               testing::Not(HasSubstr("\n"))));
    EXPECT_FALSE(saver->pending());
  };
  save_limited(true);                                // found when the file is made
  save_limited(world_.rank() == world_.size() - 1);  // found by a writer, where that is another rank
  world_.barrier();
  EXPECT_THAT(steps.steps(), ElementsAre(1));
  EXPECT_EQ(find_damage(world_, steps.path_of(1)), std::nullopt);
  saver->save(2, {{"step", 2}}, {});  // once there is room again
  EXPECT_EQ(saver->finish(), 2);
  EXPECT_EQ(find_damage(world_, steps.path_of(2)), std::nullopt);
}

TEST_F(CheckpointWriterTest, SaysOnEveryRankThatADirectoryCannotBeMade) {
  const CheckpointStore steps = store("absent");
  const Slices mine = slices(1);
  const auto saver = writer(steps, mine, 1, {});
  world_.run_on(0, [&] {
    regroup::create_directories(directory_ / "absent");
    write_text(directory_ / "absent/checkpoints", "a file in the way");
  });
  EXPECT_THAT(refusal([&] { saver->save(1, {{"step", 1}}, {}); }), HasSubstr("absent"));
}

}  // namespace
}  // namespace regroup
