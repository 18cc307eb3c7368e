#include "trainer/formats/zarr.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <utility>

#include <zlib.h>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/formats/bounded_json.h"

namespace regroup {
namespace {

using nlohmann::json;

constexpr std::uint64_t kPiece = std::uint64_t{1} << 18;         // of compressed bytes
constexpr index_t kStaged = index_t{4} << 20;                    // of elements that are converted together
constexpr std::uint64_t kLargestChunk = std::uint64_t{1} << 32;  // bytes
constexpr std::size_t kMostDimensions = 32;
// Deflate makes at most 1032 bytes of one.
constexpr std::uint64_t kLargestRatio = 1032;

class Fields {
 public:
  Fields(const json& object, std::string_view where) : object_(object), where_(where) {
    if (!object.is_object()) throw UserError("{}: it is not a JSON object", where);
  }

  bool has(const char* name) const { return object_.contains(name) && !object_[name].is_null(); }
  const json& at(const char* name) const {
    if (!has(name)) throw UserError("{}: it has no \"{}\"", where_, name);
    return object_[name];
  }
  std::string text(const char* name) const {
    if (!at(name).is_string()) refuse(name, "a text is needed");
    return at(name).get<std::string>();
  }
  std::vector<index_t> extents(const char* name, index_t least) const {
    const json& list = at(name);
    if (!list.is_array() || list.size() > kMostDimensions) refuse(name, "a list of numbers is needed");
    std::vector<index_t> result;
    for (const json& extent : list) {
      if (!extent.is_number_integer() || (extent.is_number_unsigned() && extent.get<std::uint64_t>() >> 62) ||
          extent.get<index_t>() < least) {
        refuse(name, "its numbers are impossible");
      }
      result.push_back(extent.get<index_t>());
    }
    return result;
  }
  [[noreturn]] void refuse(const char* name, const char* why) const {
    throw UserError("{}: \"{}\" is {}: {}", where_, name, shown(object_[name]), why);
  }

 private:
  const json& object_;
  std::string_view where_;
};

StoredType type_of(const Fields& fields) {
  constexpr std::array<std::pair<std::string_view, StoredType>, 9> kNames = {{{"<f8", StoredType::kF64},
                                                                              {"<f4", StoredType::kF32},
                                                                              {"<f2", StoredType::kF16},
                                                                              {"bfloat16", StoredType::kBF16},
                                                                              {"<i8", StoredType::kI64},
                                                                              {"<i4", StoredType::kI32},
                                                                              {"<u8", StoredType::kU64},
                                                                              {"<u4", StoredType::kU32},
                                                                              {"<u2", StoredType::kU16}}};
  const std::string name = fields.text("dtype");
  for (const auto& [known, type] : kNames) {
    if (known == name) return type;
  }
  fields.refuse("dtype", "only <f4, <f8, <f2, bfloat16 and integers can be read");
}

bool is_compressed(const Fields& fields) {
  if (!fields.has("compressor")) return false;
  const json& compressor = fields.at("compressor");
  const std::string id = compressor.is_object() && compressor.contains("id") && compressor["id"].is_string()
                             ? compressor["id"].get<std::string>()
                             : "";
  if (id != "gzip" && id != "zlib") fields.refuse("compressor", "only gzip, zlib and none can be read");
  return true;
}

// A zlib stream; ended on destruction.
class Inflater {
 public:
  explicit Inflater(std::string_view where) : where_(where) {
    constexpr int kEitherHeader = 15 + 32;  // of the largest window, gzip's or zlib's
    if (inflateInit2(&stream_, kEitherHeader) != Z_OK) throw std::bad_alloc();
  }
  ~Inflater() { inflateEnd(&stream_); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  // Takes what it can of `from`, fills what it can of `to`; returns whether the stream is at its end.
  bool step(std::span<std::byte>& from, std::span<std::byte>& to) {
    constexpr std::size_t kMost = std::size_t{1} << 30;  // zlib counts in 32 bits
    const auto room = static_cast<unsigned>(std::min(to.size(), kMost));
    stream_.next_in = reinterpret_cast<Bytef*>(from.data());
    stream_.avail_in = static_cast<unsigned>(from.size());
    stream_.next_out = reinterpret_cast<Bytef*>(to.data());
    stream_.avail_out = room;
    const int code = inflate(&stream_, Z_NO_FLUSH);
    from = from.last(stream_.avail_in);
    to = to.subspan(room - stream_.avail_out);
    if (code == Z_STREAM_END) return true;
    if (code == Z_OK || code == Z_BUF_ERROR) return false;
    throw UserError("{}: it is damaged: {}", where_,
                    stream_.msg != nullptr ? stream_.msg : "no deflate stream");
  }

 private:
  std::string_view where_;
  z_stream stream_{};
};

// A part of a matrix, in the file's coordinates.
struct Block {
  index_t first_row = 0, last_row = 0, first_column = 0, last_column = 0;

  index_t rows() const { return last_row - first_row; }
  index_t columns() const { return last_column - first_column; }
};

Block overlap(const Block& a, const Block& b) {
  return {std::max(a.first_row, b.first_row), std::min(a.last_row, b.last_row),
          std::max(a.first_column, b.first_column), std::min(a.last_column, b.last_column)};
}

// The elements `part` of a chunk, row behind row: where they lie, or copied to `staged`.
const std::byte* rows_of(const std::vector<std::byte>& bytes, const Block& chunk, const Block& part,
                         index_t width, std::vector<std::byte>& staged) {
  const index_t first =
      (part.first_row - chunk.first_row) * chunk.columns() + part.first_column - chunk.first_column;
  const std::byte* const from = bytes.data() + first * width;
  if (part.columns() == chunk.columns()) return from;
  const index_t row_bytes = part.columns() * width;
  staged.resize(static_cast<std::size_t>(part.rows() * row_bytes));
  for (index_t row = 0; row < part.rows(); ++row) {
    std::memcpy(staged.data() + row * row_bytes, from + row * chunk.columns() * width,
                static_cast<std::size_t>(row_bytes));
  }
  return staged.data();
}

// Converts `part` of `whole`, which goes to `out`, or whose transpose does.
void place(StoredType type, const std::byte* from, const Block& part, const Block& whole, bool transposed,
           const Tensor& out) {
  const index_t row = part.first_row - whole.first_row, column = part.first_column - whole.first_column;
  const auto element = [&out](index_t at) {
    return static_cast<std::byte*>(out.data) + at * size_of(out.dtype);
  };
  if (transposed) {
    convert_transposed(type, from, part.rows(), part.columns(), out.dtype,
                       element(column * whole.rows() + row), whole.rows());
    return;
  }
  for (index_t r = 0; r < part.rows(); ++r, from += part.columns() * size_of(type)) {
    std::byte* const to = element((row + r) * whole.columns() + column);
    if (out.dtype == DType::kFloat64) {
      convert_elements(type, from, part.columns(), reinterpret_cast<double*>(to));
    } else {
      convert_elements(type, from, part.columns(), reinterpret_cast<float*>(to));
    }
  }
}

// The array as a matrix: a vector is one row, a scalar one of one.
std::pair<index_t, index_t> matrix_of(const std::vector<index_t>& shape) {
  if (shape.size() == 2) return {shape[0], shape[1]};
  return {1, shape.empty() ? 1 : shape[0]};
}

}  // namespace

ZarrMetadata zarr_metadata(const json& object, std::string_view where) {
  const Fields fields(object, where);
  if (fields.at("zarr_format") != 2) fields.refuse("zarr_format", "only 2 can be read");
  if (fields.has("order") && fields.at("order") != "C") fields.refuse("order", "only C can be read");
  if (fields.has("filters")) fields.refuse("filters", "arrays with filters cannot be read");
  ZarrMetadata result{.type = type_of(fields),
                      .shape = fields.extents("shape", 0),
                      .chunks = fields.extents("chunks", 1),
                      .compressed = is_compressed(fields)};
  if (fields.has("fill_value")) {
    if (!fields.at("fill_value").is_number() || fields.at("fill_value") != 0) {
      fields.refuse("fill_value", "only 0 and null can be read");
    }
    result.zeros = true;
  }
  if (fields.has("dimension_separator")) {
    const std::string separator = fields.text("dimension_separator");
    if (separator != "." && separator != "/") fields.refuse("dimension_separator", "it is \".\" or \"/\"");
    result.separator = separator.front();
  }
  if (result.chunks.size() != result.shape.size()) {
    fields.refuse("chunks", "it has not as many numbers as \"shape\"");
  }
  if (!stored_bytes(result.type, result.shape)) fields.refuse("shape", "that is impossibly large");
  const auto bytes = stored_bytes(result.type, result.chunks);
  if (!bytes || *bytes > kLargestChunk) fields.refuse("chunks", "chunks of at most 4 GiB can be read");
  return result;
}

void decompress(const ByteSource& source, std::span<std::byte> bytes, std::string_view where) {
  Inflater inflater(where);
  std::vector<std::byte> piece(static_cast<std::size_t>(std::min(kPiece, source.size)));
  std::array<std::byte, 1> beyond{};  // where a byte too many would go
  std::span<std::byte> to = bytes;
  std::uint64_t at = 0;
  bool ended = false;
  while (!ended && at < source.size) {
    std::span<std::byte> from =
        std::span(piece).first(std::min<std::uint64_t>(piece.size(), source.size - at));
    source.read(at, from);
    at += from.size();
    bool moved = true;
    while (!ended && moved) {
      const bool full = to.empty();
      std::span<std::byte> room = full ? std::span<std::byte>(beyond) : to;
      const std::size_t given = from.size(), free = room.size();
      ended = inflater.step(from, room);
      moved = from.size() < given || room.size() < free;
      if (full && room.empty()) {
        throw UserError("{}: it decompresses to more than the {} bytes of a chunk", where, bytes.size());
      }
      if (!full) to = room;
    }
    at -= from.size();  // what follows the stream
  }
  if (!ended) throw UserError("{}: it is truncated: its compressed stream ends early", where);
  if (at != source.size)
    throw UserError("{}: {} bytes follow its compressed stream", where, source.size - at);
  if (!to.empty()) {
    throw UserError("{}: it decompresses to {} bytes, a chunk has {}", where, bytes.size() - to.size(),
                    bytes.size());
  }
}

std::filesystem::path ZarrArray::chunk_path(index_t i, index_t j) const {
  switch (metadata_.shape.size()) {
    case 0:
      return directory_ / "0";
    case 1:
      return directory_ / fmt::format("{}", j);
    default:
      return directory_ / fmt::format("{}{}{}", i, metadata_.separator, j);
  }
}

ChunkBytes ZarrArray::read_chunk(index_t i, index_t j) const {
  const std::filesystem::path path = chunk_path(i, j);
  std::error_code ignored;
  if (metadata_.zeros && !std::filesystem::exists(path, ignored) &&
      std::filesystem::is_directory(directory_, ignored)) {
    return nullptr;
  }
  const InputFile file(path);
  const std::uint64_t size = *stored_bytes(metadata_.type, metadata_.chunks);
  // Before memory is taken for it.
  if (metadata_.compressed ? file.size() < size / kLargestRatio : file.size() != size) {
    throw UserError("{}: it has {} bytes; that is no chunk of {}", path.string(), file.size(), size);
  }
  return cache_->get(path.string(), size, [&](std::vector<std::byte>& bytes) {
    if (metadata_.compressed) {
      decompress(source_of(file), bytes, path.string());
    } else {
      file.read(0, bytes);
    }
  });
}

std::vector<std::filesystem::path> ZarrArray::missing_chunks(std::size_t most) const {
  std::vector<std::filesystem::path> missing;
  if (metadata_.zeros || metadata_.shape.size() > 2) return missing;
  const auto [rows, columns] = matrix_of(metadata_.shape);
  const auto [chunk_rows, chunk_columns] = matrix_of(metadata_.chunks);
  if (columns == 0) return missing;
  std::error_code ignored;
  for (index_t i = 0; i * chunk_rows < rows; ++i) {
    for (index_t j = 0; j * chunk_columns < columns; ++j) {
      if (missing.size() == most) return missing;
      std::filesystem::path path = chunk_path(i, j);
      if (!std::filesystem::exists(path, ignored)) missing.push_back(std::move(path));
    }
  }
  return missing;
}

void ZarrArray::read(bool transposed, int dim, index_t begin, index_t end, const Tensor& out) const {
  const StoredType type = metadata_.type;
  const std::vector<index_t>& shape = metadata_.shape;
  if (shape.size() > 2) {
    throw UserError("{}: it has {} dimensions; at most 2 can be read", directory_.string(), shape.size());
  }
  const auto [rows, columns] = matrix_of(shape);
  const auto [chunk_rows, chunk_columns] = matrix_of(metadata_.chunks);
  Block wanted = {0, rows, 0, columns};
  if (shape.size() == 2 && (dim == 0) != transposed) {
    wanted = {begin, end, 0, columns};
  } else if (!shape.empty()) {
    wanted = {0, rows, begin, end};
  }
  std::vector<std::byte> staged;
  for (index_t i = wanted.first_row / chunk_rows; i * chunk_rows < wanted.last_row; ++i) {
    for (index_t j = wanted.first_column / chunk_columns; j * chunk_columns < wanted.last_column; ++j) {
      const Block chunk = {i * chunk_rows, (i + 1) * chunk_rows, j * chunk_columns, (j + 1) * chunk_columns};
      const Block all = overlap(chunk, wanted);
      const ChunkBytes bytes = read_chunk(i, j);
      const index_t row_bytes = all.columns() * size_of(type);
      const index_t together = std::max<index_t>(1, kStaged / row_bytes);
      for (Block part = all; part.first_row < all.last_row; part.first_row = part.last_row) {
        part.last_row = std::min(all.last_row, part.first_row + together);
        if (bytes == nullptr) staged.assign(static_cast<std::size_t>(part.rows() * row_bytes), std::byte{0});
        place(type, bytes == nullptr ? staged.data() : rows_of(*bytes, chunk, part, size_of(type), staged),
              part, wanted, transposed, out);
      }
    }
  }
}

}  // namespace regroup
