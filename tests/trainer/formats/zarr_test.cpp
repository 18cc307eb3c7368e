#include "trainer/formats/zarr.h"

#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include "kernels/base/json.h"
#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/formats/t5x.h"

namespace regroup {
namespace {

using nlohmann::json;
using test::bytes_of;
using test::refusal;
using test::TemporaryDirectory;
using testing::AllOf;
using testing::HasSubstr;

json good_fields() {
  return {{"zarr_format", 2},          {"shape", {7, 5}},
          {"chunks", {3, 2}},          {"dtype", "<f4"},
          {"fill_value", nullptr},     {"order", "C"},
          {"filters", nullptr},        {"compressor", {{"id", "gzip"}, {"level", 1}}},
          {"dimension_separator", "."}};
}

// What zlib itself makes of the bytes; 31: gzip's header, 15: zlib's.
std::string deflated(const std::string& bytes, int header = 31) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, header, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string result(deflateBound(&stream, bytes.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<unsigned>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(result.data());
  stream.avail_out = static_cast<unsigned>(result.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  result.resize(stream.total_out);
  deflateEnd(&stream);
  return result;
}

// Element (r, c) of the test's arrays.
float value_at(index_t r, index_t c) { return static_cast<float>(100 * r + c) + 0.5F; }

// Writes the chunks of value_at(), each whole, as zarr has them at the edges too.
template <class T>
void write_chunks(const std::filesystem::path& directory, const ZarrMetadata& metadata, int header) {
  const index_t rows = metadata.chunks[0], columns = metadata.chunks[1];
  for (index_t i = 0; i * rows < metadata.shape[0]; ++i) {
    for (index_t j = 0; j * columns < metadata.shape[1]; ++j) {
      std::vector<T> values;
      for (index_t k = 0; k < rows * columns; ++k) {
        values.push_back(static_cast<T>(value_at(i * rows + k / columns, j * columns + k % columns)));
      }
      const auto path = directory / fmt::format("{}{}{}", i, metadata.separator, j);
      std::filesystem::create_directories(path.parent_path());
      write_text(path, metadata.compressed ? deflated(bytes_of(values), header) : bytes_of(values));
    }
  }
}

// Every slice, plain and transposed, in both types.
void expect_every_slice(const ZarrArray& array) {
  const index_t shape[] = {array.metadata().shape[0], array.metadata().shape[1]};
  for (const bool transposed : {false, true}) {
    for (int dim = 0; dim < 2; ++dim) {
      const index_t extent = shape[transposed ? 1 - dim : dim];
      for (index_t begin = 0; begin < extent; ++begin) {
        for (index_t end = begin + 1; end <= extent; ++end) {
          std::vector<index_t> part = {shape[transposed ? 1 : 0], shape[transposed ? 0 : 1]};
          part[static_cast<std::size_t>(dim)] = end - begin;
          std::vector<float> found(static_cast<std::size_t>(part[0] * part[1]), -1);
          std::vector<double> wide(found.size(), -1);
          array.read(transposed, dim, begin, end, Tensor(found.data(), DType::kFloat32, part));
          array.read(transposed, dim, begin, end, Tensor(wide.data(), DType::kFloat64, part));
          for (index_t k = 0; k < part[0] * part[1]; ++k) {
            const index_t row = k / part[1] + (dim == 0 ? begin : 0);
            const index_t column = k % part[1] + (dim == 1 ? begin : 0);
            const float expected = transposed ? value_at(column, row) : value_at(row, column);
            ASSERT_EQ(found[static_cast<std::size_t>(k)], expected) << transposed << dim << begin << end << k;
            ASSERT_EQ(wide[static_cast<std::size_t>(k)], expected);
          }
        }
      }
    }
  }
}

TEST(Zarr, ReadsEverySliceHoweverItIsStored) {
  for (const auto& [chunks, separator, header] : {std::tuple{std::vector<index_t>{3, 2}, '.', 31},
                                                  {{7, 5}, '.', 15},
                                                  {{1, 5}, '/', 31},
                                                  {{4, 9}, '.', 0}}) {
    const TemporaryDirectory directory;
    const ZarrMetadata metadata = {.type = StoredType::kF32,
                                   .shape = {7, 5},
                                   .chunks = chunks,
                                   .compressed = header != 0,
                                   .separator = separator};
    write_chunks<float>(directory.path(), metadata, header);
    expect_every_slice(ZarrArray(directory.path(), metadata));
  }
  const TemporaryDirectory directory;
  const ZarrMetadata metadata = {
      .type = StoredType::kF64, .shape = {7, 5}, .chunks = {2, 3}, .compressed = true};
  write_chunks<double>(directory.path(), metadata, 31);
  expect_every_slice(ZarrArray(directory.path(), metadata));
}

TEST(Zarr, ReadsVectorsScalarsAndOtherTypes) {
  const TemporaryDirectory directory;
  write_text(directory / "0", deflated(bytes_of(std::vector<bfloat16>{bfloat16(1.5F), bfloat16(-2)})));
  write_text(directory / "1", deflated(bytes_of(std::vector<bfloat16>{bfloat16(3), bfloat16(9)})));
  const ZarrArray vector(directory.path(),
                         {.type = StoredType::kBF16, .shape = {3}, .chunks = {2}, .compressed = true});
  std::vector<float> found(2);
  vector.read(false, 0, 1, 3, Tensor(found.data(), DType::kFloat32, {2}));
  EXPECT_EQ(found, (std::vector<float>{-2, 3}));
  const ZarrArray scalar(directory.path(), {.type = StoredType::kF32, .compressed = true});
  found.resize(1);
  scalar.read(false, 0, 0, 1, Tensor(found.data(), DType::kFloat32, {}));
  EXPECT_EQ(found[0], std::bit_cast<float>(0xC0003FC0U));  // the two numbers as one
}

TEST(Zarr, OpensOnlyTheChunksOfTheSlice) {
  const TemporaryDirectory directory;
  const ZarrMetadata metadata = {.shape = {7, 5}, .chunks = {3, 2}, .compressed = true};
  write_chunks<float>(directory.path(), metadata, 31);
  for (const char* other : {"0.0", "0.1", "0.2", "2.0", "2.1", "2.2"})
    std::filesystem::remove(directory / other);
  const ZarrArray array(directory.path(), metadata);
  std::vector<float> found(15);
  array.read(false, 0, 3, 6, Tensor(found.data(), DType::kFloat32, {3, 5}));
  EXPECT_EQ(found[14], value_at(5, 4));
  array.read(true, 1, 3, 6, Tensor(found.data(), DType::kFloat32, {5, 3}));
  EXPECT_EQ(found[14], value_at(5, 4));
  EXPECT_THAT(refusal([&] {
                array.read(false, 0, 2, 3, Tensor(found.data(), DType::kFloat32, {1, 5}));
              }),
              HasSubstr("0.0"));
}

// A head of a matrix that is stored as its transpose is a few columns of every chunk.
TEST(Zarr, AChunkIsInflatedOnceForAllItsHeads) {
  const TemporaryDirectory directory;
  const ZarrMetadata metadata = {.shape = {12, 16}, .chunks = {12, 16}, .compressed = true};
  std::filesystem::create_directories(directory / "q");
  std::filesystem::create_directories(directory / "k");
  write_chunks<float>(directory / "q", metadata, 31);
  write_chunks<float>(directory / "k", metadata, 31);
  const auto cache = std::make_shared<ChunkCache>();
  const ZarrArray q(directory / "q", metadata, cache), k(directory / "k", metadata, cache);
  std::vector<float> found(24);
  for (index_t head = 0; head < 8; ++head) {
    for (const ZarrArray* array : {&q, &k}) {
      array->read(true, 0, 2 * head, 2 * head + 2, Tensor(found.data(), DType::kFloat32, {2, 12}));
      EXPECT_EQ(found[13], value_at(1, 2 * head + 1));
    }
  }
  EXPECT_EQ(cache->loads(), 2U);
}

TEST(ChunkCache, KeepsTheLastUsedWithinItsBudget) {
  ChunkCache cache(10000);
  const auto get = [&cache](const std::string& key, std::uint64_t size) {
    const ChunkBytes bytes =
        cache.get(key, size, [&](std::vector<std::byte>& all) { all.front() = std::byte(key.front()); });
    EXPECT_EQ(bytes->size(), size);
    EXPECT_EQ(bytes->front(), std::byte(key.front()));
    EXPECT_LE(cache.bytes(), 10000U);
    return cache.loads();
  };
  EXPECT_EQ(get("a", 4000), 1U);
  EXPECT_EQ(get("b", 4000), 2U);
  EXPECT_EQ(get("a", 4000), 2U);
  EXPECT_EQ(get("c", 4000), 3U);  // in b's place
  EXPECT_EQ(get("a", 4000), 3U);
  EXPECT_EQ(get("b", 4000), 4U);
  EXPECT_EQ(get("d", 10000), 5U);  // larger than the budget: used, not kept
  EXPECT_EQ(cache.bytes(), 0U);
  EXPECT_EQ(get("d", 10000), 6U);
  for (int i = 0; i < 1000; ++i) get(fmt::format("small {}", i), 1);  // bounded in number too
  // What could not be read is not kept.
  const auto failing = [](std::vector<std::byte>&) { throw UserError("no"); };
  EXPECT_EQ(refusal([&] { cache.get("e", 100, failing); }), "no");
  const std::uint64_t before = cache.loads();
  EXPECT_EQ(get("e", 100), before + 1);
}

TEST(Zarr, AMissingChunkIsZerosOnlyWhereThatIsSaid) {
  const TemporaryDirectory directory;
  ZarrMetadata metadata = {.shape = {2, 2}, .chunks = {1, 2}, .compressed = true, .zeros = true};
  write_text(directory / "1.0", deflated(bytes_of(std::vector<float>{3, 4})));
  std::vector<float> found(4, -1);
  const Tensor out(found.data(), DType::kFloat32, {2, 2});
  ZarrArray(directory.path(), metadata).read(false, 0, 0, 2, out);
  EXPECT_EQ(found, (std::vector<float>{0, 0, 3, 4}));
  ZarrArray(directory.path(), metadata).read(true, 0, 0, 2, out);
  EXPECT_EQ(found, (std::vector<float>{0, 3, 0, 4}));
  EXPECT_NE(refusal([&] { ZarrArray(directory / "none", metadata).read(false, 0, 0, 2, out); }), "accepted");
  metadata.zeros = false;
  EXPECT_THAT(refusal([&] { ZarrArray(directory.path(), metadata).read(false, 0, 0, 2, out); }),
              HasSubstr("0.0"));
}

TEST(Zarr, RefusesDamagedChunks) {
  const TemporaryDirectory directory;
  const std::string good = deflated(bytes_of(std::vector<float>{1, 2, 3, 4}));
  const ZarrMetadata metadata = {.shape = {2, 2}, .chunks = {2, 2}, .compressed = true};
  std::vector<float> found(4);
  const auto refused = [&](const std::string& chunk, ZarrMetadata how) {
    write_text(directory / "0.0", chunk);
    return refusal([&] {
      ZarrArray(directory.path(), how).read(false, 0, 0, 2, Tensor(found.data(), DType::kFloat32, {2, 2}));
    });
  };
  EXPECT_EQ(refused(good, metadata), "accepted");
  EXPECT_THAT(refused("", metadata), AllOf(HasSubstr("0.0"), HasSubstr("truncated")));
  EXPECT_THAT(refused("no gzip stream", metadata), HasSubstr("damaged"));
  EXPECT_THAT(refused(good + "x", metadata), HasSubstr("1 bytes follow"));
  for (std::size_t length = 1; length < good.size(); ++length) {
    EXPECT_NE(refused(good.substr(0, length), metadata), "accepted") << length;
  }
  std::string flipped = good;
  flipped[flipped.size() - 6] ^= 1;  // its checksum
  EXPECT_THAT(refused(flipped, metadata), HasSubstr("damaged"));
  EXPECT_THAT(refused(deflated(bytes_of(std::vector<float>{1, 2, 3})), metadata),
              HasSubstr("12 bytes, a chunk has 16"));
  // A bomb: 64 MiB of zeros in 64 kB.
  EXPECT_THAT(refused(deflated(std::string(1 << 26, '\0')), metadata), HasSubstr("more than the 16 bytes"));
  // Too small a file for what it is to become: no memory is taken.
  EXPECT_THAT(refused(good, {.shape = {2, 2}, .chunks = {2, index_t{1} << 28}, .compressed = true}),
              HasSubstr("no chunk of 2147483648"));
  EXPECT_THAT(refused("12345", {.shape = {2, 2}, .chunks = {2, 2}}), HasSubstr("5 bytes"));
}

TEST(Zarr, ReadsMetadata) {
  EXPECT_EQ(zarr_metadata(good_fields(), "x"),
            (ZarrMetadata{.shape = {7, 5}, .chunks = {3, 2}, .compressed = true}));
  json fields = good_fields();
  for (const char* optional : {"fill_value", "order", "filters", "compressor", "dimension_separator"}) {
    fields.erase(optional);
  }
  fields["dtype"] = "bfloat16";
  EXPECT_EQ(zarr_metadata(fields, "x"),
            (ZarrMetadata{.type = StoredType::kBF16, .shape = {7, 5}, .chunks = {3, 2}}));
  fields["fill_value"] = 0.0;
  fields["dimension_separator"] = "/";
  EXPECT_TRUE(zarr_metadata(fields, "x").zeros);
  EXPECT_EQ(zarr_metadata(fields, "x").separator, '/');
}

TEST(Zarr, RefusesMetadataInOneClearLine) {
  const std::vector<std::tuple<const char*, json, const char*>> cases = {
      {"zarr_format", 3, "only 2"},
      {"zarr_format", nullptr, "has no \"zarr_format\""},
      {"shape", nullptr, "has no \"shape\""},
      {"shape", 7, "a list of numbers"},
      {"shape", {7, -1}, "impossible"},
      {"shape", {7, 0.5}, "impossible"},
      {"shape", {7, 18446744073709551615ULL}, "impossible"},
      {"shape", {4294967296, 4294967296}, "impossibly large"},
      {"shape", std::vector<int>(40, 1), "a list of numbers"},
      {"shape", {7}, "as many numbers"},
      {"chunks", {0, 2}, "impossible"},
      {"chunks", {65536, 65536}, "at most 4 GiB"},
      {"dtype", ">f4", "only <f4"},
      {"dtype", "|O", "only <f4"},
      {"dtype", 4, "a text"},
      {"compressor", {{"id", "blosc"}}, "only gzip, zlib"},
      {"compressor", "gzip", "only gzip, zlib"},
      {"filters", json::array({json::object()}), "filters"},
      {"order", "F", "only C"},
      {"fill_value", 1, "only 0 and null"},
      {"fill_value", "NaN", "only 0 and null"},
      {"dimension_separator", "", "\".\" or \"/\""},
      {"dimension_separator", "..", "\".\" or \"/\""},
  };
  for (const auto& [field, value, message] : cases) {
    json fields = good_fields();
    fields[field] = value;
    const std::string found = refusal([&] { zarr_metadata(fields, "a/.zarray"); });
    EXPECT_THAT(found, AllOf(HasSubstr(message), testing::StartsWith("a/.zarray: "), HasSubstr(field)));
    EXPECT_EQ(found.find('\n'), std::string::npos);
  }
  EXPECT_THAT(refusal([] { zarr_metadata(json::array(), "a"); }), HasSubstr("not a JSON object"));
}

// However deep a value is, neither its check nor the message recurses into it.
TEST(Zarr, DeepMetadataIsRefusedWithoutRecursion) {
  for (const char* field : {"zarr_format", "shape", "chunks", "dtype", "compressor", "filters", "order",
                            "fill_value", "dimension_separator"}) {
    json deep = 1;
    for (int i = 0; i < 200'000; ++i) deep = json::array({std::move(deep)});
    json fields = good_fields();
    fields[field] = std::move(deep);
    EXPECT_THAT(refusal([&] { zarr_metadata(fields, "a"); }), HasSubstr(field));
  }
}

TEST(Zarr, ChunksAreCutAsT5xDoes) {
  // By hand after the rule: the longest dimension to its next smaller divisor, until it fits.
  constexpr index_t kElements = index_t{1} << 24;
  EXPECT_EQ(t5x_chunks({512}, kElements), (std::vector<index_t>{512}));
  EXPECT_EQ(t5x_chunks({4096, 4096}, kElements), (std::vector<index_t>{4096, 4096}));
  EXPECT_EQ(t5x_chunks({32128, 4096}, kElements), (std::vector<index_t>{4016, 4096}));
  EXPECT_EQ(t5x_chunks({4096, 10240}, kElements), (std::vector<index_t>{4096, 2560}));
  EXPECT_EQ(t5x_chunks({12, 10}, 20), (std::vector<index_t>{4, 5}));
  EXPECT_EQ(t5x_chunks({7, 7}, 7), (std::vector<index_t>{1, 7}));
  EXPECT_EQ(t5x_chunks({3, 5}, 1), (std::vector<index_t>{1, 1}));
}

// What is asked for of a matrix of value_at(), which is counted.
ReadSlice values_of(index_t columns, bool transposed, index_t& elements) {
  return [=, &elements](int dim, index_t begin, index_t /*end*/, const Tensor& out) {
    elements += out.numel();
    for (index_t k = 0; k < out.numel(); ++k) {
      const index_t row = k / out.shape[1] + (dim == 0 ? begin : 0);
      const index_t column = k % out.shape[1] + (dim == 1 ? begin : 0);
      EXPECT_LT(column, columns);
      out.as<float>()[k] = transposed ? value_at(column, row) : value_at(row, column);
    }
  };
}

TEST(Zarr, WhatIsWrittenIsReadAndAskedForOnce) {
  for (const bool transposed : {false, true}) {
    for (const auto& chunks : {std::vector<index_t>{7, 5}, {1, 5}, {3, 5}, {7, 1}, {7, 4}, {3, 2}}) {
      const TemporaryDirectory directory;
      const ZarrMetadata metadata = {.shape = {7, 5}, .chunks = chunks, .compressed = true};
      index_t elements = 0;
      std::set<std::filesystem::path> files;
      for (index_t i = 0; i < chunk_count(metadata); ++i) {
        files.insert(write_zarr_chunk(directory.path(), metadata, transposed, i,
                                      values_of(transposed ? 7 : 5, transposed, elements)));
      }
      EXPECT_EQ(static_cast<index_t>(files.size()), chunk_count(metadata));
      EXPECT_EQ(zarr_metadata(json::parse(to_json(metadata)), "x"), metadata);
      expect_every_slice(ZarrArray(directory.path(), metadata));
      if (chunks[0] == 7 || chunks[1] == 5) {  // cut along one dimension
        EXPECT_EQ(elements, 35);
      }
    }
  }
}

// Cut along both dimensions, slices go beyond the chunk: they are asked for a few at a time.
TEST(Zarr, ChunksAreWrittenInTheMemoryOfTwo) {
  const TemporaryDirectory directory;
  const ZarrMetadata metadata = {.shape = {1000, 1100}, .chunks = {100, 110}, .compressed = true};
  for (const bool transposed : {false, true}) {
    index_t elements = 0, most = 0;
    const ReadSlice values = values_of(transposed ? 1000 : 1100, transposed, elements);
    write_zarr_chunk(directory.path(), metadata, transposed, 13,
                     [&](int dim, index_t begin, index_t end, const Tensor& out) {
                       most = std::max(most, out.numel());
                       values(dim, begin, end, out);
                     });
    EXPECT_LE(most, 100 * 110);
    const ChunkBytes chunk = ZarrArray(directory.path(), metadata).read_chunk(1, 3);
    std::vector<float> found(100 * 110);
    std::memcpy(found.data(), chunk->data(), chunk->size());
    for (index_t i = 0; i < std::ssize(found); ++i) {
      ASSERT_EQ(found[static_cast<std::size_t>(i)], value_at(100 + i / 110, 330 + i % 110));
    }
  }
}

}  // namespace
}  // namespace regroup
