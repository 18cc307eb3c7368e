#include "trainer/formats/torch_file.h"

#include <fstream>
#include <map>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/formats/torch_writer.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/formats/checkpoint_reader.h"

namespace regroup {
namespace {

using test::pickle_of;
using test::pickled;
using test::pickled_call;
using test::pickled_dict;
using test::pickled_global;
using test::pickled_tuple;
using test::refusal;
using test::torch_legacy;
using test::torch_zip;
using test::TorchTensor;
using testing::AllOf;
using testing::HasSubstr;

const std::filesystem::path kFixtures = std::filesystem::path(REGROUP_GOLDEN) / "torch";

std::vector<float> values_of(const CheckpointReader& reader, const std::string& name) {
  const std::vector<index_t>& shape = reader.find(name)->shape;
  const auto count = std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies<>());
  std::vector<float> values(static_cast<std::size_t>(count));
  reader.read(name, 0, 0, shape.empty() ? 1 : shape[0], Tensor(values.data(), DType::kFloat32, shape));
  return values;
}

// Files that PyTorch wrote: tests/golden/make_imports.py.
class TorchFixture : public testing::TestWithParam<const char*> {};

TEST_P(TorchFixture, IsReadAsItWasWritten) {
  ASSERT_TRUE(is_torch_file(InputFile(kFixtures / GetParam())));
  const CheckpointReader reader(kFixtures / GetParam());
  EXPECT_EQ(reader.tensors().size(), 17U);
  const std::vector<float> grid = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  EXPECT_EQ(values_of(reader, "matrix"), grid);
  EXPECT_EQ(values_of(reader, "same"), grid);
  EXPECT_EQ(reader.find("same")->begin, reader.find("matrix")->begin);
  EXPECT_EQ(values_of(reader, "transposed"), (std::vector<float>{0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11}));
  EXPECT_EQ(reader.find("transposed")->shape, (std::vector<index_t>{4, 3}));
  EXPECT_EQ(values_of(reader, "part"), (std::vector<float>{4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(values_of(reader, "parameter"), (std::vector<float>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(reader.find("parameter")->shape, (std::vector<index_t>{1, 2, 3}));
  EXPECT_EQ(values_of(reader, "scalar"), (std::vector<float>{7}));
  EXPECT_EQ(values_of(reader, "empty"), std::vector<float>());
  EXPECT_EQ(reader.find("empty")->shape, (std::vector<index_t>{0, 3}));
  EXPECT_EQ(values_of(reader, "column"), (std::vector<float>{0, 1, 2, 3, 4}));
  for (const char* name : {"f64", "f16", "bf16"}) {
    EXPECT_EQ(values_of(reader, name), (std::vector<float>{0, 1, 2})) << name;
  }
  const std::map<std::string, StoredType> types = {{"matrix", StoredType::kF32}, {"f64", StoredType::kF64},
                                                   {"f16", StoredType::kF16},    {"bf16", StoredType::kBF16},
                                                   {"i64", StoredType::kI64},    {"i32", StoredType::kI32},
                                                   {"i16", StoredType::kI16},    {"i8", StoredType::kI8},
                                                   {"u8", StoredType::kU8},      {"bool", StoredType::kBool}};
  for (const auto& [name, type] : types) EXPECT_EQ(reader.find(name)->type, type) << name;
}

// Either every tensor lies in the file, or a UserError says why not. Returns whether it is read.
bool reads_or_refuses(const std::filesystem::path& path) {
  try {
    const InputFile file(path);
    is_torch_file(file);
    for (const StoredTensor& tensor : read_torch_tensors(file)) {
      EXPECT_LE(tensor.begin, tensor.end);
      EXPECT_LE(tensor.end, file.size());
      EXPECT_EQ(tensor.end - tensor.begin, stored_bytes(tensor.type, tensor.shape));
    }
    return true;
  } catch (const UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr(path.string()));
    EXPECT_THAT(error.what(), testing::Not(HasSubstr("\n")));
    return false;
  }
}

TEST_P(TorchFixture, IsRefusedWhereItIsTruncated) {
  const test::TemporaryDirectory directory;
  const std::filesystem::path path = directory / "t.bin";
  std::filesystem::copy_file(kFixtures / GetParam(), path);
  for (std::uintmax_t size = std::filesystem::file_size(path); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    EXPECT_FALSE(reads_or_refuses(path)) << size;
  }
}

TEST_P(TorchFixture, IsReadOrRefusedWithAnyByteWrong) {
  const test::TemporaryDirectory directory;
  const std::filesystem::path path = directory / "t.bin";
  std::filesystem::copy_file(kFixtures / GetParam(), path);
  const std::string bytes = read_text(path);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](std::size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  std::size_t refused = 0;
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    for (const int flip : {0x01, 0x80, 0xFF}) {
      put(at, static_cast<char>(bytes[at] ^ flip));
      if (!reads_or_refuses(path)) ++refused;
    }
    put(at, bytes[at]);
  }
  EXPECT_GT(refused, bytes.size());  // the flips have come to the file
  EXPECT_TRUE(reads_or_refuses(path));
}

INSTANTIATE_TEST_SUITE_P(Files, TorchFixture,
                         testing::Values("zip.bin", "zip_protocol4.bin", "legacy.bin",
                                         "legacy_protocol5.bin"),
                         [](const auto& param) {
                           const std::string name = param.param;
                           return name.substr(0, name.find('.'));
                         });

class TorchFile : public testing::Test {
 protected:
  std::vector<StoredTensor> tensors(const std::string& bytes) {
    write_text(directory_ / "t.bin", bytes);
    return read_torch_tensors(InputFile(directory_ / "t.bin"));
  }
  std::string refused(const std::string& bytes) {
    return refusal([&] { tensors(bytes); });
  }
  // Of a file whose pickle makes `value`, in both formats.
  std::string refused_value(const std::string& value, std::size_t storage_bytes = 24) {
    const std::vector<std::pair<std::string, std::string>> storages = {
        {"0", std::string(storage_bytes, 'x')}};
    const std::string message = refused(torch_zip(pickle_of(value), storages));
    EXPECT_EQ(refused(torch_legacy(pickle_of(value), storages)), message);
    return message;
  }
  std::string refused_tensor(const TorchTensor& tensor) {
    return refused_value(pickled_dict({{"weight", pickled(tensor)}}));
  }

  test::TemporaryDirectory directory_;
};

const TorchTensor kGood = {.shape = {2, 3}, .strides = {3, 1}, .count = 6};

TEST_F(TorchFile, ChecksTensorsAgainstTheirStorages) {
  EXPECT_EQ(refused_tensor(kGood), "accepted");
  EXPECT_EQ(refused_tensor({.shape = {3}, .strides = {1}, .offset = 3, .count = 6}), "accepted");
  EXPECT_THAT(
      refused_tensor({.shape = {3}, .strides = {1}, .offset = 4, .count = 6}),
      AllOf(HasSubstr("t.bin: tensor 'weight' of shape [3] at element 4"), HasSubstr("storage of 6")));
  EXPECT_THAT(refused_tensor({.shape = {3}, .strides = {1}, .offset = -1, .count = 6}),
              HasSubstr("at element -1"));
  EXPECT_THAT(refused_tensor({.shape = {7}, .strides = {1}, .count = 6}), HasSubstr("beyond its storage"));
  constexpr std::int64_t kHuge = std::int64_t{1} << 62;
  EXPECT_THAT(refused_tensor({.shape = {kHuge, kHuge}, .strides = {1, 1}, .count = 6}),
              HasSubstr("impossible shape"));
  EXPECT_THAT(refused_tensor({.shape = {-1}, .strides = {1}, .count = 6}),
              HasSubstr("impossible shape [-1]"));
  EXPECT_THAT(refused_tensor({.shape = {0, kHuge}, .strides = {1, 1}, .offset = 7, .count = 6}),
              HasSubstr("'weight' "));
  EXPECT_THAT(refused_tensor({.shape = {1}, .strides = {1}, .count = kHuge}), HasSubstr("impossibly large"));
  EXPECT_THAT(refused_tensor({.shape = {1}, .strides = {1}, .count = -6}), HasSubstr("cannot be read"));
  EXPECT_THAT(refused_tensor({.shape = {2, 3}, .strides = {1}, .count = 6}), HasSubstr("damaged"));
}

TEST_F(TorchFile, ReadsTransposesAndRefusesOtherStrides) {
  const TorchTensor transposed = {.shape = {2, 3}, .strides = {1, 2}, .count = 6};
  EXPECT_TRUE(tensors(torch_zip(pickle_of(pickled_dict({{"t", pickled(transposed)}})),
                                {{"0", std::string(24, 'x')}}))[0]
                  .transposed);
  for (const std::vector<std::int64_t>& strides :
       std::vector<std::vector<std::int64_t>>{{0, 0}, {3, 2}, {6, 1}, {-3, 1}, {1, 1}, {1, 3}, {0, 1}}) {
    EXPECT_THAT(refused_tensor({.shape = {2, 3}, .strides = strides, .count = 6}),
                AllOf(HasSubstr("tensor 'weight' of shape [2, 3]"), HasSubstr("neither row-major nor a")));
  }
  EXPECT_THAT(refused_tensor({.shape = {1 << 20, 6}, .strides = {0, 1}, .count = 6}), HasSubstr("strides"));
  EXPECT_THAT(refused_tensor({.shape = {1, 2, 3}, .strides = {6, 1, 2}, .count = 6}), HasSubstr("strides"));
  // Where there is one index only its stride says nothing.
  EXPECT_EQ(refused_tensor({.shape = {1, 6, 1}, .strides = {-7, 1, 1 << 30}, .count = 6}), "accepted");
}

TEST_F(TorchFile, RefusesEverythingButTensors) {
  const std::string tensor = pickled(kGood);
  EXPECT_THAT(refused_value("N"), HasSubstr("it holds None, not a dictionary"));
  EXPECT_THAT(refused_value(tensor), HasSubstr("it holds an object"));
  EXPECT_THAT(refused_value("](N"
                            "e"),
              HasSubstr("it holds a list"));
  EXPECT_THAT(
      refused_value(pickled_dict({{"state_dict", pickled_dict({{"weight", tensor}})}})),
      AllOf(HasSubstr("'state_dict' is a dictionary, not a tensor"), HasSubstr("model.state_dict()")));
  EXPECT_THAT(refused_value(pickled_dict({{"epoch", pickled(3)}})), HasSubstr("'epoch' is a number"));
  EXPECT_THAT(refused_value(pickled_dict({{"name", pickled("x")}})), HasSubstr("'name' is a text"));
  EXPECT_THAT(refused_value(pickled_dict({{"none", "N"}})), HasSubstr("'none' is None"));
  EXPECT_THAT(refused_value(std::string("}") + pickled(3) + tensor + "s"),
              HasSubstr("has a number for a name"));
  EXPECT_THAT(refused_value(pickled_dict({{"w", tensor}, {"w", tensor}})), HasSubstr("'w' is there twice"));
  EXPECT_THAT(refused_value(pickled_dict({{"a\tb", tensor}})), HasSubstr("'a?b' has control characters"));
  EXPECT_THAT(refused_value(pickled_dict({{"w", pickled_call(pickled_global("torch", "FloatStorage"), {})}})),
              HasSubstr("'w' is made by torch.FloatStorage"));
  const std::string parameter = pickled_global("torch._utils", "_rebuild_parameter");
  EXPECT_EQ(refused_value(pickled_dict({{"w", pickled_call(parameter, {tensor, "\x88", "}"})}})), "accepted");
  EXPECT_THAT(refused_value(pickled_dict({{"w", pickled_call(parameter, {})}})), HasSubstr("'w' is damaged"));
  EXPECT_THAT(refused_value(pickled_dict({{"w", pickled_call(parameter, {"N"})}})),
              HasSubstr("'w' is damaged"));
  EXPECT_THAT(
      refused_value(pickled_dict({{"w", pickled_call(parameter, {pickled_call(parameter, {tensor})})}})),
      HasSubstr("'w' is made by torch._utils._rebuild_parameter"));
}

TEST_F(TorchFile, RunsNoCode) {
  const std::vector<std::pair<std::string, std::string>> names = {{"os", "system"},
                                                                  {"builtins", "eval"},
                                                                  {"numpy.core.multiarray", "_reconstruct"},
                                                                  {"torch", "load"},
                                                                  {"__builtin__", "exec"},
                                                                  {"torch._utils", "_rebuild_tensor_v3"},
                                                                  {"torch", "Tensor"},
                                                                  {"torch.nn.modules.linear", "Linear"}};
  for (const auto& [module, name] : names) {
    const std::string call = pickled_call(pickled_global(module, name), {pickled("touch ran")});
    EXPECT_THAT(refused_value(pickled_dict({{"weight", call}})),
                HasSubstr("t.bin: the pickle asks for '" + module + "." + name + "', which is not a tensor"));
    // A bare pickle, as any of the pickles of the format before 1.6.
    EXPECT_THAT(refused(pickle_of(call)), HasSubstr("asks for '" + module));
    write_text(directory_ / "bare.bin", pickle_of(call));
    EXPECT_THAT(refusal([&] { CheckpointReader reader(directory_ / "bare.bin"); }),
                HasSubstr("asks for '" + module));
  }
  EXPECT_THAT(refused(pickle_of("N")), HasSubstr("torch.save() did not write it"));
}

TEST_F(TorchFile, ChecksStoragesAgainstTheFile) {
  const std::string pickle = pickle_of(pickled_dict({{"weight", pickled(kGood)}}));
  const std::string data(24, 'x');
  EXPECT_THAT(refused(torch_zip(pickle, {})), HasSubstr("the storage '0' is missing"));
  EXPECT_THAT(refused(torch_zip(pickle, {{"0", data + "x"}})), HasSubstr("has 25 bytes instead of 24"));
  EXPECT_THAT(refused(torch_zip(pickle, {{"0", "x"}})), HasSubstr("has 1 bytes instead of 24"));
  EXPECT_THAT(refused(torch_legacy(pickle, {})), HasSubstr("1 of 1 storages are missing"));
  EXPECT_THAT(refused(torch_legacy(pickle, {{"0", data}, {"0", data}})), HasSubstr("twice"));
  EXPECT_THAT(refused(torch_legacy(pickle, {{"0", data}, {"1", data}})),
              HasSubstr("'1' belongs to no tensor"));
  EXPECT_THAT(refused(torch_legacy(pickle, {{"0", data + data}})), HasSubstr("12 elements instead of 6"));
  EXPECT_THAT(refused(torch_legacy(pickle, {{"0", data}}) + "x"), HasSubstr("1 bytes at the end"));
  const std::string good = torch_legacy(pickle, {{"0", data}});
  EXPECT_THAT(refused(good.substr(0, good.size() - 1)), HasSubstr("truncated"));
  // One storage, two types or sizes.
  for (const TorchTensor& other :
       {TorchTensor{.shape = {1}, .strides = {1}, .count = 5},
        TorchTensor{.shape = {1}, .strides = {1}, .count = 6, .storage = "IntStorage"}}) {
    EXPECT_THAT(refused_value(pickled_dict({{"a", pickled(kGood)}, {"b", pickled(other)}})),
                HasSubstr("tensor 'b' has a storage that another tensor has"));
  }
}

TEST_F(TorchFile, RefusesOtherArchivesAndByteOrders) {
  const std::string pickle = pickle_of(pickled_dict({{"weight", pickled(kGood)}}));
  const std::vector<std::pair<std::string, std::string>> storages = {{"0", std::string(24, 'x')}};
  EXPECT_THAT(refused(test::zip_of({{"x.txt", "hello"}})), HasSubstr("no <root>/data.pkl"));
  EXPECT_THAT(refused(test::zip_of({{"a/data.pkl", pickle}, {"b/data.pkl", pickle}})),
              HasSubstr("two data.pkl"));
  EXPECT_THAT(refused(test::zip_of({{"a/data.pkl", pickle}, {"a/byteorder", "big"}})),
              HasSubstr("big-endian"));
  EXPECT_THAT(refused(test::zip_of({{"a/data.pkl", pickle, 0, 8}})), HasSubstr("compressed"));
  for (const char* system : {"N", "}", "\x88"}) {
    EXPECT_THAT(refused(torch_legacy(pickle, storages, 4, pickle_of(system))), HasSubstr("big-endian"));
  }
  EXPECT_THAT(
      refused(torch_legacy(pickle, storages, 4, pickle_of(pickled_dict({{"little_endian", "\x89"}})))),
      HasSubstr("big-endian"));
}

TEST_F(TorchFile, IsFoundInADirectoryWithoutSafetensors) {
  const std::string pickle = pickle_of(pickled_dict({{"weight", pickled(kGood)}}));
  EXPECT_FALSE(CheckpointReader::exists(directory_.path()));
  write_text(directory_ / "pytorch_model.bin", torch_zip(pickle, {{"0", std::string(24, '\0')}}));
  EXPECT_TRUE(CheckpointReader::exists(directory_.path()));
  EXPECT_FALSE(CheckpointReader::exists(directory_.path(), "optimizer"));
  EXPECT_THAT(refusal([&] { CheckpointReader reader(directory_.path(), "optimizer"); }),
              HasSubstr("neither optimizer.safetensors nor optimizer.safetensors.index.json"));
  ASSERT_NE(CheckpointReader(directory_.path()).find("weight"), nullptr);
  test::write_plain_file(directory_ / "model.safetensors", {test::plain_tensor("other", {1}, {1})});
  EXPECT_EQ(CheckpointReader(directory_.path()).find("weight"), nullptr);
  // What a file is, its name does not tell.
  std::filesystem::rename(directory_ / "model.safetensors", directory_ / "a.bin");
  std::filesystem::rename(directory_ / "pytorch_model.bin", directory_ / "b.safetensors");
  EXPECT_NE(CheckpointReader(directory_ / "a.bin").find("other"), nullptr);
  EXPECT_NE(CheckpointReader(directory_ / "b.safetensors").find("weight"), nullptr);
}

}  // namespace
}  // namespace regroup
