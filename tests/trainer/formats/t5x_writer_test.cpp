#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "tests/trainer/checkpoint/whole_tensor.h"
#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/formats/t5x.h"

namespace regroup {
namespace {

using test::refusal;
using test::TemporaryDirectory;
using test::whole_tensor;
using testing::HasSubstr;

ModelConfig small() {
  return {.vocab_size = 30,
          .d_model = 12,
          .d_kv = 3,
          .d_ff = 20,
          .num_heads = 4,
          .num_layers = 2,
          .num_decoder_layers = 1,
          .kv_groups = 2,
          .encoder_kv_groups = 4};
}

// Parameters, and slots of three of them.
std::vector<T5xTensor> tensors_of(const ModelConfig& config) {
  std::vector<T5xTensor> tensors;
  for (const ParameterSpec& spec : parameter_table(config)) tensors.push_back({spec.name, spec.shape});
  const std::string wi = "encoder.block.1.layer.1.DenseReluDense.wi_1.weight";
  const std::string k = "decoder.block.0.layer.0.SelfAttention.k.weight";
  tensors.insert(tensors.end(), {{wi + ".second_moment_row", {20}},
                                 {wi + ".second_moment_column", {12}},
                                 {"shared.weight.second_moment_row", {30}},
                                 {"shared.weight.second_moment_column", {12}},
                                 {k + ".second_moment", {6, 12}},
                                 {"lm_head.weight.second_moment_row", {30}},
                                 {"lm_head.weight.second_moment_column", {12}}});
  return tensors;
}

float value_of(const std::string& name, index_t i) {
  return static_cast<float>(
      Philox(5, RandomPurpose::kTest, key_of(name)).normal(static_cast<std::uint64_t>(i)));
}

ReadSlice slices_of(const T5xTensor& tensor) {
  return [&tensor](int dim, index_t begin, index_t /*end*/, const Tensor& out) {
    const bool matrix = tensor.shape.size() == 2;
    const index_t width = matrix ? tensor.shape[1] : 1, out_width = matrix ? out.shape[1] : 1;
    for (index_t i = 0; i < out.numel(); ++i) {
      const index_t row = i / out_width + (dim == 0 ? begin : 0);
      const index_t column = i % out_width + (dim == 1 ? begin : 0);
      out.as<float>()[i] = value_of(tensor.name, row * width + column);
    }
  };
}

void write_all(T5xWriter& writer, std::size_t i, const T5xTensor& tensor) {
  for (index_t chunk = 0; chunk < writer.chunks(i); ++chunk) writer.write(i, chunk, slices_of(tensor));
}

TEST(T5xWriter, WhatIsWrittenIsRead) {
  const TemporaryDirectory run;
  const auto directory = run / "checkpoint_1234567";
  const std::vector<T5xTensor> tensors = tensors_of(small());
  T5xWriter one(directory, tensors), other(directory, tensors);  // two processes
  for (std::size_t i = 0; i < tensors.size(); ++i) write_all(i % 2 == 0 ? one : other, i, tensors[i]);
  one.sync();
  other.sync();
  EXPECT_FALSE(t5x_index(directory));
  one.write_index(1234567);
  const CheckpointReader model(run.path()), optimizer(directory, "optimizer");
  EXPECT_EQ(config_of_shapes(model.tensors(), "x"), small());
  EXPECT_EQ(model.tensors().size() + optimizer.tensors().size(), tensors.size());
  for (const T5xTensor& tensor : tensors) {
    const CheckpointReader& reader = model.find(tensor.name) != nullptr ? model : optimizer;
    ASSERT_NE(reader.find(tensor.name), nullptr) << tensor.name;
    EXPECT_EQ(reader.find(tensor.name)->shape, tensor.shape);
    const std::vector<float> values = whole_tensor(reader, tensor.name);
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(values[i], value_of(tensor.name, static_cast<index_t>(i))) << tensor.name << " " << i;
    }
  }
  EXPECT_EQ(T5xCheckpoint(directory / "checkpoint").step(), 1234567);
}

// A large matrix is several processes' work; each chunk is written as it will stay, without a file aside.
TEST(T5xWriter, ProcessesShareTheChunksOfATensor) {
  const TemporaryDirectory directory;
  const T5xTensor wo = {"encoder.block.0.layer.1.DenseReluDense.wo.weight", {2050, 9000}};
  T5xWriter one(directory.path(), {wo}), other(directory.path(), {wo});
  ASSERT_EQ(one.chunks(0), 2);  // of 4500 of the file's rows, which are the tensor's columns
  index_t elements = 0;
  const ReadSlice read = [&](int dim, index_t begin, index_t /*end*/, const Tensor& out) {
    elements += out.numel();
    for (index_t i = 0; i < out.numel(); ++i) {
      const index_t row = i / out.shape[1] + (dim == 0 ? begin : 0);
      out.as<float>()[i] = static_cast<float>(row + (i % out.shape[1] + (dim == 1 ? begin : 0)) % 100);
    }
  };
  other.write(0, 1, read);
  one.write(0, 0, read);
  EXPECT_EQ(elements, 2050 * 9000);
  std::set<std::string> names;
  for (const auto& entry :
       std::filesystem::directory_iterator(directory / "target.encoder.layers_0.mlp.wo.kernel")) {
    names.insert(entry.path().filename().string());
  }
  EXPECT_EQ(names, (std::set<std::string>{".zarray", "0.0", "1.0"}));
  one.write_index(1);
  std::vector<float> found(9000);
  CheckpointReader(directory.path())
      .read(wo.name, 0, 2049, 2050, Tensor(found.data(), DType::kFloat32, {1, 9000}));
  for (index_t i = 0; i < 9000; ++i) {
    ASSERT_EQ(found[static_cast<std::size_t>(i)], static_cast<float>(2049 + i % 100));
  }
}

// The names of the directories say which slot is which.
TEST(T5xWriter, PlacesSlotsWhereT5xHasThem) {
  const TemporaryDirectory directory;
  const std::vector<T5xTensor> tensors = tensors_of(small());
  T5xWriter writer(directory.path(), tensors);
  const std::map<std::string, std::string> places = {
      {"shared.weight.second_moment_row", "token_embedder.embedding.v_col"},
      {"shared.weight.second_moment_column", "token_embedder.embedding.v_row"},
      {"lm_head.weight.second_moment_row", "decoder.logits_dense.kernel.v_col"},
      {"encoder.block.1.layer.1.DenseReluDense.wi_1.weight.second_moment_column",
       "encoder.layers_1.mlp.wi_1.kernel.v_row"},
      {"decoder.block.0.layer.0.SelfAttention.k.weight.second_moment",
       "decoder.layers_0.self_attention.key.kernel.v"}};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto place = places.find(tensors[i].name);
    if (place == places.end()) continue;
    write_all(writer, i, tensors[i]);
    EXPECT_TRUE(std::filesystem::exists(directory / ("state.param_states." + place->second) / ".zarray"))
        << place->second;
  }
}

TEST(T5xWriter, NamesWhatT5xDoesNotHave) {
  EXPECT_THAT(refusal([] {
                T5xWriter("x", {{"encoder.block.0.layer.0.Attention.q.weight", {2, 2}}});
              }),
              HasSubstr("'encoder.block.0.layer.0.Attention.q.weight'"));
  EXPECT_THAT(refusal([] {
                T5xWriter("x", {{"shared.weight.second_moment_row", {2}}});
              }),
              HasSubstr("'shared.weight.second_moment_row'"));
}

}  // namespace
}  // namespace regroup
