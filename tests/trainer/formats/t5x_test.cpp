#include "trainer/formats/t5x.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/json.h"
#include "tests/trainer/checkpoint/whole_tensor.h"
#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/formats/names.h"

namespace regroup {
namespace {

using nlohmann::json;
using test::refusal;
using test::TemporaryDirectory;
using test::whole_tensor;
using testing::AllOf;
using testing::HasSubstr;

const std::filesystem::path kImports = std::filesystem::path(REGROUP_GOLDEN) / "imports";

ModelConfig fixture_config() {
  return {.vocab_size = 40,
          .d_model = 16,
          .d_kv = 4,
          .d_ff = 24,
          .num_heads = 4,
          .num_layers = 1,
          .num_decoder_layers = 2,
          .kv_groups = 4,
          .encoder_kv_groups = 4};
}

class T5xFixture : public testing::TestWithParam<const char*> {
 protected:
  std::filesystem::path path_ = kImports / GetParam();
  CheckpointReader contents_ = CheckpointReader(kImports / "t5x_zarr" / "contents.safetensors");
};
INSTANTIATE_TEST_SUITE_P(Checkpoint, T5xFixture, testing::Values("t5x_zarr", "t5x_legacy"));

// The folder, whose arrays are in the msgpack file or beside it, against what was put in.
TEST_P(T5xFixture, HasTheParametersUnderTransformersNames) {
  ASSERT_TRUE(CheckpointReader::exists(path_));
  const CheckpointReader reader(path_);
  EXPECT_EQ(config_of_shapes(reader.tensors(), "x"), fixture_config());
  EXPECT_NO_THROW(reader.require(parameter_table(fixture_config())));
  for (const ParameterSpec& spec : parameter_table(fixture_config())) {
    EXPECT_EQ(whole_tensor(reader, spec.name), whole_tensor(contents_, spec.name)) << spec.name;
  }
}

TEST_P(T5xFixture, GivesAnySlice) {
  const CheckpointReader reader(path_);
  for (const char* name :
       {"shared.weight", "lm_head.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}) {
    const std::vector<index_t> shape = contents_.find(name)->shape;
    for (int dim = 0; dim < 2; ++dim) {
      const index_t extent = shape[static_cast<std::size_t>(dim)];
      const auto part = local_shape({.dim = dim, .begin = 1, .end = extent - 1}, shape);
      std::vector<double> found(static_cast<std::size_t>(part[0] * part[1])), expected(found.size());
      reader.read(name, dim, 1, extent - 1, Tensor(found.data(), DType::kFloat64, part));
      contents_.read(name, dim, 1, extent - 1, Tensor(expected.data(), DType::kFloat64, part));
      EXPECT_EQ(found, expected) << name << dim;
    }
  }
}

// The slots are what T5X's rule made of the gradients as T5X has them; contents has the means of the
// transposed gradients over rows and columns: of larger outputs (wi), larger inputs (wo), square (q) and the
// embedding.
TEST_P(T5xFixture, HasTheMomentsOfThisPrograms) {
  ASSERT_TRUE(CheckpointReader::exists(path_, "optimizer"));
  const CheckpointReader reader(path_, "optimizer");
  std::size_t expected = 0, factored = 0;
  for (const StoredTensor* slot : contents_.tensors()) {
    if (slot->name.find(".second_moment") == std::string::npos) continue;
    ++expected;
    factored += slot->name.ends_with("_row");
    ASSERT_NE(reader.find(slot->name), nullptr) << slot->name;
    ASSERT_EQ(reader.find(slot->name)->shape, slot->shape) << slot->name;
    const std::vector<float> found = whole_tensor(reader, slot->name);
    const std::vector<float> wanted = whole_tensor(contents_, slot->name);
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_NEAR(found[i], wanted[i], 1e-6 * wanted[i]) << slot->name << " " << i;
    }
  }
  EXPECT_EQ(reader.tensors().size(), expected);
  EXPECT_EQ(factored, 31U);
}

TEST_P(T5xFixture, SaysItsStep) {
  const auto index = t5x_index(path_);
  ASSERT_TRUE(index);
  EXPECT_EQ(T5xCheckpoint(*index).step(), 1000);
  EXPECT_EQ(t5x_index(*index), index);
  EXPECT_EQ(t5x_index(index->parent_path()), index);
}

TEST(FactoredSlots, FollowTheLongerAxis) {
  const auto text = [](const FactoredSlots& slots) {
    return std::string(slots.row) + " " + std::string(slots.column);
  };
  EXPECT_EQ(text(factored_slots({128, 256}, true)), "v_col v_row");     // more outputs than inputs
  EXPECT_EQ(text(factored_slots({256, 128}, true)), "v_row v_col");     // more inputs
  EXPECT_EQ(text(factored_slots({128, 128}, true)), "v_col v_row");     // the second axis counts as longer
  EXPECT_EQ(text(factored_slots({32128, 512}, false)), "v_col v_row");  // an embedding
  EXPECT_EQ(text(factored_slots({512, 1024}, false)), "v_row v_col");
}

TEST(T5xIndex, IsTheNewestOfItsRun) {
  const TemporaryDirectory directory;
  EXPECT_FALSE(t5x_index(directory.path()));
  EXPECT_FALSE(t5x_index(directory / "none"));
  const auto text = read_text(kImports / "t5x_legacy" / "checkpoint");
  for (const char* name :
       {"checkpoint_9", "checkpoint_10", "checkpoint_11.tmp-1", "checkpoint_x", "checkpoint_"}) {
    std::filesystem::create_directories(directory / name);
    write_text(directory / name / "checkpoint", text);
  }
  std::filesystem::create_directories(directory / "checkpoint_12");  // without a file
  EXPECT_EQ(t5x_index(directory.path()), directory / "checkpoint_10" / "checkpoint");
  write_text(directory / "checkpoint_20", text);  // before there were directories
  EXPECT_EQ(t5x_index(directory.path()), directory / "checkpoint_20");
  write_text(directory / "checkpoint_10" / "checkpoint", "model_checkpoint_path: \"x\"");  // TensorFlow's
  EXPECT_FALSE(t5x_index(directory / "checkpoint_10"));
}

// A checkpoint of one array, whose description is `leaf`.
std::string opened(const TemporaryDirectory& directory, const json& leaf, int version = 3) {
  const json root = {{"version", version}, {"optimizer", {{"target", {{"a", {{"b", leaf}}}}}}}};
  const std::vector<std::uint8_t> bytes = json::to_msgpack(root);
  write_text(directory / "checkpoint", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  return refusal([&] { CheckpointReader reader(directory / "checkpoint"); });
}

// Two numbers in one chunk.
void write_array(const TemporaryDirectory& directory, const std::string& name) {
  std::filesystem::create_directories(directory / name);
  write_text(directory / name / "0", test::bytes_of(std::vector<float>{1, 2}));
}

json described(const std::string& path) {
  return {{"driver", "zarr"},
          {"dtype", "float32"},
          {"kvstore", {{"driver", "gfile"}, {"path", path}}},
          {"metadata", {{"chunks", {2}}, {"compressor", nullptr}, {"shape", {2}}}}};
}

TEST(T5xCheckpoint, RefusesHostileDescriptions) {
  const TemporaryDirectory directory;
  write_array(directory, "target.a.b");
  EXPECT_EQ(opened(directory, described("target.a.b/")), "accepted");
  json old = described("");
  old["kvstore"].erase("path");
  old["path"] = "target.a.b";
  EXPECT_EQ(opened(directory, old), "accepted");
  for (const char* path :
       {"", ".", "..", "/", "../x", "/etc/passwd", "a/../../b", "x/y", "a\\b", "target.a.b//"}) {
    EXPECT_THAT(opened(directory, described(path)),
                AllOf(HasSubstr("'a/b'"), HasSubstr("the name of a directory")));
  }
  EXPECT_THAT(opened(directory, described(std::string("a\0b", 3))), HasSubstr("the name of a directory"));
  EXPECT_THAT(opened(directory, described("gone")), HasSubstr("copy them there: gone/"));
  json bad = described("target.a.b");
  bad["driver"] = "n5";
  EXPECT_THAT(opened(directory, bad), HasSubstr("only zarr"));
  for (const char* key : {"kvstore", "metadata", "dtype", "driver"}) {
    for (const json& value : {json(7), json("x"), json::array(), json::object(), json(nullptr)}) {
      bad = described("target.a.b");
      bad[key] = value;
      EXPECT_NE(opened(directory, bad), "accepted") << key << value;
    }
  }
  EXPECT_THAT(opened(directory, 7), HasSubstr("'a/b' is no array"));
  EXPECT_THAT(opened(directory, {{"__msgpack_chunked_array__", true}, {"shape", json::object()}}),
              AllOf(HasSubstr("'a/b'"), HasSubstr("cut into pieces")));
  const json strange = json::binary(json::to_msgpack({{1}, "datetime64", json::binary({0})}), 1);
  EXPECT_THAT(opened(directory, strange), HasSubstr("'datetime64'"));
  write_text(directory / "checkpoint", "\x81\xA7version\x03");
  EXPECT_THAT(refusal([&] { CheckpointReader reader(directory / "checkpoint"); }),
              HasSubstr("no T5X checkpoint"));
}

TEST(T5xCheckpoint, ListsEverythingThatIsMissing) {
  const TemporaryDirectory directory;
  write_array(directory, "here");
  std::filesystem::create_directories(directory / "cut");
  json cut = described("cut"), zeros = described("zeros");
  cut["metadata"]["shape"] = {5};
  write_text(directory / "cut" / "1", test::bytes_of(std::vector<float>{1, 2}));
  std::filesystem::create_directories(directory / "zeros");
  zeros["metadata"]["fill_value"] = 0;
  const json target = {{"a", described("here")},
                       {"b", described("gone")},
                       {"c", cut},
                       {"d", zeros},
                       {"e", described("gone too")}};
  const auto bytes = json::to_msgpack({{"optimizer", {{"target", target}}}});
  write_text(directory / "checkpoint", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  EXPECT_THAT(refusal([&] { CheckpointReader reader(directory / "checkpoint"); }),
              testing::EndsWith("4 parts of its arrays are missing beside it, copy them there: gone/, cut/0, "
                                "cut/2, gone too/"));
  // However many it claims to have.
  cut["metadata"]["shape"] = {index_t{1} << 60};
  EXPECT_THAT(opened(directory, cut), AllOf(HasSubstr("at least 65536 parts"), HasSubstr("cut/65536")));
}

// What is there is told by the index; what is missing of it, by whoever reads it.
TEST(T5xCheckpoint, ExistsByItsIndexAlone) {
  const TemporaryDirectory directory;
  const auto text = read_text(kImports / "t5x_zarr" / "checkpoint_1000" / "checkpoint");
  write_text(directory / "checkpoint", text);
  EXPECT_TRUE(CheckpointReader::exists(directory.path()));
  EXPECT_TRUE(CheckpointReader::exists(directory.path(), "optimizer"));
  EXPECT_FALSE(CheckpointReader::exists(directory.path(), "other"));
  for (const char* stem : {"model", "optimizer"}) {
    EXPECT_THAT(refusal([&] { CheckpointReader reader(directory.path(), stem); }), HasSubstr("missing"));
  }
}

TEST(T5xCheckpoint, BelievesTheArraysOwnDescription) {
  const TemporaryDirectory directory;
  std::filesystem::create_directories(directory / "target.a.b");
  write_text(directory / "target.a.b" / "0", test::bytes_of(std::vector<float>{5}));
  write_text(directory / "target.a.b" / "1", test::bytes_of(std::vector<float>{6}));
  json fields = {
      {"zarr_format", 2}, {"shape", {2}}, {"chunks", {1}}, {"dtype", "<f4"}, {"compressor", nullptr}};
  write_text(directory / "target.a.b" / ".zarray", fields.dump());
  EXPECT_EQ(opened(directory, described("target.a.b")), "accepted");
  EXPECT_EQ(whole_tensor(CheckpointReader(directory / "checkpoint"), "a/b"), (std::vector<float>{5, 6}));
  fields["shape"] = {3};
  write_text(directory / "target.a.b" / ".zarray", fields.dump());
  EXPECT_THAT(opened(directory, described("target.a.b")), HasSubstr("its shape is not the one"));
  write_text(directory / "target.a.b" / ".zarray", "{");
  EXPECT_THAT(opened(directory, described("target.a.b")), HasSubstr("not a JSON object"));
  const std::string deep(500'000, '[');
  for (const char* field : {"shape", "dtype", "other"}) {
    write_text(directory / "target.a.b" / ".zarray",
               fmt::format("{{\"{}\":{}{}}}", field, deep, std::string(deep.size(), ']')));
    EXPECT_THAT(opened(directory, described("target.a.b")),
                AllOf(HasSubstr(".zarray"), HasSubstr("nested deeper than 32")));
  }
}

// Before version 3 bfloat16 was stored as uint16.
TEST(T5xCheckpoint, ReadsBfloat16OfVersion2) {
  const TemporaryDirectory directory;
  std::filesystem::create_directories(directory / "target.a.b");
  write_text(directory / "target.a.b" / "0", test::bytes_of(std::vector{bfloat16(1.5F), bfloat16(-3.0F)}));
  json leaf = described("target.a.b");
  leaf["dtype"] = "uint16";
  EXPECT_EQ(opened(directory, leaf, 2), "accepted");
  EXPECT_EQ(whole_tensor(CheckpointReader(directory / "checkpoint"), "a/b"),
            (std::vector<float>{1.5F, -3.0F}));
  EXPECT_EQ(opened(directory, leaf, 3), "accepted");
  EXPECT_EQ(CheckpointReader(directory / "checkpoint").find("a/b")->type, StoredType::kU16);
}

// Only an integer says how long it was trained.
TEST(T5xCheckpoint, AStepIsAnIntegerScalar) {
  const TemporaryDirectory directory;
  const auto step_of = [&](const json& step) {
    const json root = {{"optimizer", {{"target", json::object()}, {"state", {{"step", step}}}}}};
    const auto bytes = json::to_msgpack(root);
    write_text(directory / "checkpoint", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    return T5xCheckpoint(directory / "checkpoint").step();
  };
  const auto array = [](const std::vector<index_t>& shape, const char* type,
                        std::vector<std::uint8_t> bytes) {
    return json::binary(json::to_msgpack(json::array({shape, type, json::binary(std::move(bytes))})), 1);
  };
  EXPECT_EQ(step_of(7), 7);
  EXPECT_EQ(step_of(-7), std::nullopt);
  EXPECT_EQ(step_of("7"), std::nullopt);
  EXPECT_EQ(step_of(array({}, "int32", {7, 1, 0, 0})), 263);
  EXPECT_EQ(step_of(array({}, "int64", {7, 0, 0, 0, 0, 0, 0, 0})), 7);
  EXPECT_EQ(step_of(array({}, "float32", {0, 0, 128, 63})), std::nullopt);
  EXPECT_EQ(step_of(array({}, "datetime64", {7, 0, 0, 0})), std::nullopt);
  EXPECT_EQ(step_of(array({2}, "int32", {7, 0, 0, 0, 8, 0, 0, 0})), std::nullopt);
  json zarr = described("step");
  zarr["metadata"] = {{"chunks", json::array()}, {"compressor", nullptr}, {"shape", json::array()}};
  zarr["dtype"] = "int32";
  std::filesystem::create_directories(directory / "step");
  EXPECT_EQ(step_of(zarr), 0);  // not there: zero
  write_text(directory / "step" / "0", test::bytes_of(std::vector<std::int32_t>{9}));
  EXPECT_EQ(step_of(zarr), 9);
  zarr["dtype"] = "float32";
  EXPECT_EQ(step_of(zarr), std::nullopt);
  // Where it has a shape its chunks, which may be of 4 GiB, are not read.
  zarr["dtype"] = "int32";
  zarr["metadata"] = {{"chunks", {1 << 29}}, {"compressor", nullptr}, {"shape", {1 << 29}}};
  EXPECT_EQ(step_of(zarr), std::nullopt);
}

TEST(T5xCheckpoint, UnknownParametersAreListed) {
  const TemporaryDirectory directory;
  write_array(directory, "target.a.b");
  ASSERT_EQ(opened(directory, described("target.a.b")), "accepted");
  const CheckpointReader reader(directory / "checkpoint");
  EXPECT_THAT(refusal([&] { reader.require(parameter_table(fixture_config())); }),
              HasSubstr("1 unknown (a/b)"));
  EXPECT_FALSE(CheckpointReader::exists(directory / "checkpoint", "optimizer"));
  EXPECT_EQ(T5xCheckpoint(directory / "checkpoint").step(), std::nullopt);
}

// What T5X itself wrote: a T5 1.1 at step 0, at its initial values, with zero slots.
TEST(T5xCheckpoint, ReadsAFileOfT5x) {
  const auto path = std::filesystem::path(REGROUP_SHARED) / "data" / "t5x_tiny_legacy.msgpack";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  const CheckpointReader reader(path);
  const ModelConfig config = config_of_shapes(reader.tensors(), path.string());
  const ModelConfig expected = {.vocab_size = 32128,
                                .d_model = 8,
                                .d_kv = 3,
                                .d_ff = 16,
                                .num_heads = 4,
                                .num_layers = 2,
                                .num_decoder_layers = 2,
                                .kv_groups = 4,
                                .encoder_kv_groups = 4};
  EXPECT_EQ(config, expected);
  EXPECT_NO_THROW(reader.require(parameter_table(config)));
  EXPECT_EQ(T5xCheckpoint(path).step(), 0);
  const CheckpointReader slots(path, "optimizer");
  EXPECT_EQ(slots.tensors().size(), parameter_table(config).size());  // none is factored, none a dummy
  for (const ParameterSpec& spec : parameter_table(config)) {
    const std::vector<float> values = whole_tensor(reader, spec.name);
    double squares = 0, largest = 0;
    for (const float value : values) {
      squares += value * value;
      largest = std::max(largest, std::abs(static_cast<double>(value)));
    }
    const double rms = std::sqrt(squares / static_cast<double>(values.size()));
    const std::string slot = spec.name + ".second_moment";
    ASSERT_NE(slots.find(slot), nullptr) << slot;
    EXPECT_EQ(slots.find(slot)->shape, spec.shape);
    const std::vector<float> zeros = whole_tensor(slots, slot);
    EXPECT_EQ(std::count(zeros.begin(), zeros.end(), 0.0F), static_cast<index_t>(values.size()));
    if (spec.initializer == Initializer::kOnes) {
      EXPECT_EQ(std::count(values.begin(), values.end(), 1.0F), static_cast<index_t>(values.size()));
      continue;
    }
    if (spec.initializer == Initializer::kUniform) {
      EXPECT_LE(largest, spec.scale);
      EXPECT_NEAR(rms, spec.scale / std::sqrt(3.0), 0.15 * spec.scale);
      continue;
    }
    EXPECT_NEAR(rms, spec.scale, 0.35 * spec.scale) << spec.name;  // of as few as 96 numbers
    const double limit = spec.initializer == Initializer::kTruncatedNormal ? 2.28 : 6;
    EXPECT_LE(largest, limit * spec.scale) << spec.name;
  }
}

}  // namespace
}  // namespace regroup
