#include "trainer/formats/t5x.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/formats/bounded_json.h"
#include "trainer/formats/names.h"

namespace regroup {
namespace {

using Kind = MsgpackValue::Kind;
using nlohmann::json;

constexpr std::array<const char*, 2> kTarget = {"optimizer", "target"};
constexpr std::array<const char*, 3> kStep = {"optimizer", "state", "step"};
constexpr std::array<const char*, 3> kStates = {"optimizer", "state", "param_states"};
// Version 2 stored bfloat16 as uint16 in zarr arrays.
constexpr std::int64_t kNativeBfloat16 = 3;
// Chunks that are listed, so that nobody waits for an array that claims to have 2^60 of them.
constexpr std::size_t kMostMissing = std::size_t{1} << 16;

// Whether it begins as a map with a key of a checkpoint does.
bool begins_as_index(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  const InputFile file(path);
  std::string text(std::min<std::uint64_t>(file.size(), 16), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  if (text.size() < 2 || (static_cast<unsigned char>(text[0]) & 0xF0) != 0x80) return false;
  const auto length = static_cast<unsigned char>(text[1]);
  return std::ranges::any_of(std::array{"version", "optimizer"}, [&](std::string_view key) {
    return length == (0xA0 | key.size()) && text.substr(2).starts_with(key);
  });
}

// The step of a directory's name "checkpoint_<step>".
std::optional<index_t> step_of(const std::string& name) {
  constexpr std::string_view kPrefix = "checkpoint_";
  index_t step = 0;
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const char* const end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (error != std::errc() || stop != end || step < 0) return std::nullopt;
  return step;
}

json to_json(const MsgpackValue& value) {
  switch (value.kind) {
    case Kind::kBool:
      return value.integer != 0;
    case Kind::kInteger:
      return value.integer;
    case Kind::kReal:
      return value.real;
    case Kind::kText:
      return value.text;
    case Kind::kList: {
      json result = json::array();
      for (const MsgpackValue& item : value.list) result.push_back(to_json(item));
      return result;
    }
    case Kind::kMap: {
      json result = json::object();
      for (const auto& [key, item] : value.map) result[key] = to_json(item);
      return result;
    }
    default:
      return nullptr;
  }
}

bool is_description(const MsgpackValue& value) {
  return value.find("driver") != nullptr && value.find("kvstore") != nullptr;
}

// How zarr calls what TensorStore's description calls so.
std::string zarr_type(const std::string& name) {
  const std::optional<StoredType> type = type_of_numpy(name);
  if (!type || *type == StoredType::kBF16) return name;
  const char kind = is_floating(*type) ? 'f' : name.front() == 'u' ? 'u' : 'i';
  return fmt::format("<{}{}", kind, size_of(*type));
}

// T5X's unused slots.
bool is_dummy(const std::vector<index_t>& shape) { return shape == std::vector<index_t>{1}; }

}  // namespace

struct T5xCheckpoint::Slot {
  Leaf leaf, target;  // the parameter that it is of
  OtherName name;     // of that
  std::string slot;   // "v", "v_row", "v_col"
};

struct T5xCheckpoint::Found {
  std::vector<StoredTensor> dense, zarr;
  std::vector<ZarrArray> arrays;                // of zarr
  std::set<std::filesystem::path> directories;  // that were looked into
  std::vector<std::string> missing;             // beside the index
};

FactoredSlots factored_slots(const std::vector<index_t>& file_shape, bool transposed) {
  const int of_v_row = file_shape[0] > file_shape[1] ? 1 : 0;  // the axis that it is indexed by
  const int of_rows = transposed ? 1 : 0;                      // the axis of transformers' rows
  return of_v_row == of_rows ? FactoredSlots{.row = "v_row", .column = "v_col"}
                             : FactoredSlots{.row = "v_col", .column = "v_row"};
}

std::optional<std::filesystem::path> t5x_index(const std::filesystem::path& path) {
  if (begins_as_index(path)) return path;
  if (begins_as_index(path / "checkpoint")) return path / "checkpoint";
  std::error_code error;
  std::optional<std::filesystem::path> newest;
  index_t newest_step = -1;
  std::filesystem::directory_iterator entry(path, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::optional<index_t> step = step_of(entry->path().filename().string());
    if (!step || *step <= newest_step) continue;
    const std::filesystem::path& at = entry->path();
    const std::filesystem::path index = begins_as_index(at) ? at : at / "checkpoint";
    if (!begins_as_index(index)) continue;
    newest_step = *step;
    newest = index;
  }
  return newest;
}

T5xCheckpoint::T5xCheckpoint(std::filesystem::path index) : index_(std::move(index)) {
  const InputFile file(index_);
  root_ = parse_msgpack(source_of(file), index_.string());
  const MsgpackValue* target = branch(kTarget);
  if (target == nullptr || target->kind != Kind::kMap) {
    throw UserError("{}: it is no T5X checkpoint: it has no optimizer/target", index_.string());
  }
}

const MsgpackValue* T5xCheckpoint::branch(std::span<const char* const> keys) const {
  const MsgpackValue* at = &root_;
  for (const char* key : keys) {
    at = at->find(key);
    if (at == nullptr) return nullptr;
  }
  return at;
}

void T5xCheckpoint::flatten(const MsgpackValue& tree, const std::string& path, std::vector<Leaf>& leaves) {
  if (tree.kind == Kind::kNil) return;
  if (tree.kind != Kind::kMap || is_description(tree) || tree.find("__msgpack_chunked_array__") != nullptr) {
    leaves.push_back({path, &tree});
    return;
  }
  for (const auto& [key, value] : tree.map) {
    flatten(value, path.empty() ? key : fmt::format("{}/{}", path, key), leaves);
  }
}

std::vector<T5xCheckpoint::Leaf> T5xCheckpoint::leaves(std::span<const char* const> keys) const {
  std::vector<Leaf> result;
  const MsgpackValue* tree = branch(keys);
  if (tree != nullptr && tree->kind == Kind::kMap) flatten(*tree, "", result);
  return result;
}

std::string T5xCheckpoint::describe(const Leaf& leaf) const {
  return fmt::format("{}: array '{}'", index_.string(), printable(leaf.path));
}

std::filesystem::path T5xCheckpoint::directory_of(const Leaf& leaf) const {
  const auto text = [](const MsgpackValue* value) { return value == nullptr ? "" : value->text; };
  const std::string where = describe(leaf);
  const std::string driver = text(leaf.value->find("driver"));
  if (driver != "zarr") {
    throw UserError("{}: its driver is {}; only zarr can be read", where, printable(driver));
  }
  // Before TensorStore 0.1.14 the path was beside "kvstore".
  const MsgpackValue* const own = leaf.value->find("kvstore")->find("path");
  std::string name = text(own != nullptr ? own : leaf.value->find("path"));
  if (name.ends_with('/')) name.pop_back();
  if (name.empty() || name == "." || name == ".." ||
      name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
    throw UserError("{}: its path must be the name of a directory beside that file, not '{}'", where,
                    printable(name));
  }
  return index_.parent_path() / name;
}

ZarrArray T5xCheckpoint::zarr_array(const Leaf& leaf, bool zeros) const {
  const std::filesystem::path directory = directory_of(leaf);
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored)) {
    throw UserError("{}: its directory {} is missing", describe(leaf), directory.string());
  }
  const json description = to_json(*leaf.value);
  json fields = description.value("metadata", json::object());
  if (fields.is_object()) {
    fields["zarr_format"] = 2;
    const json type = description.value("dtype", json());
    if (!fields.contains("dtype") && type.is_string()) fields["dtype"] = zarr_type(type.get<std::string>());
  }
  const std::filesystem::path own = directory / ".zarray";
  std::string described = describe(leaf);
  if (std::filesystem::exists(own, ignored)) {  // its chunks may be other ones than those first asked for
    described = own.string();
    const json stated = fields.is_object() ? fields.value("shape", json()) : json();
    fields = parse_bounded(read_text(own, 1 << 20), described);
    if (fields.is_object() && !stated.is_null() && fields.value("shape", json()) != stated) {
      throw UserError("{}: its shape is not the one that {} states", described, index_.string());
    }
  }
  ZarrMetadata metadata = zarr_metadata(fields, described);
  const MsgpackValue* version = root_.find("version");
  if (metadata.type == StoredType::kU16 && version != nullptr && version->integer < kNativeBfloat16) {
    metadata.type = StoredType::kBF16;
  }
  metadata.zeros |= zeros;
  return {directory, std::move(metadata), cache_};
}

void T5xCheckpoint::add(Found& found, const Leaf& leaf, const std::string& name, bool transposed,
                        bool zeros) const {
  const auto tensor = [&](StoredTensor stored) {
    stored.name = name;
    stored.transposed = transposed && stored.shape.size() == 2;
    if (stored.transposed) std::swap(stored.shape[0], stored.shape[1]);
    return stored;
  };
  if (is_description(*leaf.value)) {
    const std::filesystem::path directory = directory_of(leaf);
    const bool fresh = found.directories.insert(directory).second;
    std::error_code ignored;
    if (!std::filesystem::is_directory(directory, ignored)) {
      if (fresh) found.missing.push_back(printable(directory.filename().string()) + "/");
      return;
    }
    found.arrays.push_back(zarr_array(leaf, zeros));
    const ZarrArray& array = found.arrays.back();
    if (fresh && found.missing.size() < kMostMissing) {
      for (const auto& chunk : array.missing_chunks(kMostMissing - found.missing.size())) {
        found.missing.push_back(printable(chunk.lexically_relative(index_.parent_path()).string()));
      }
    }
    const ZarrMetadata& metadata = array.metadata();
    found.zarr.push_back(tensor({.name = {}, .type = metadata.type, .shape = metadata.shape}));
    return;
  }
  if (leaf.value->kind == Kind::kMap) {
    throw UserError(
        "{}: array '{}' is cut into pieces, which cannot be read; have T5X save it again, as zarr arrays",
        index_.string(), printable(leaf.path));
  }
  if (leaf.value->kind != Kind::kArray || !type_of_numpy(leaf.value->type_name)) {
    throw UserError("{}: '{}' is no array{}", index_.string(), printable(leaf.path),
                    leaf.value->kind == Kind::kArray
                        ? fmt::format(" of a known type, but of '{}'", printable(leaf.value->type_name))
                        : "");
  }
  found.dense.push_back(tensor(leaf.value->array));
}

std::vector<std::unique_ptr<TensorFile>> T5xCheckpoint::files(Found found) const {
  if (!found.missing.empty()) {
    throw UserError("{}: {}{} parts of its arrays are missing beside it, copy them there: {}",
                    index_.string(), found.missing.size() < kMostMissing ? "" : "at least ",
                    found.missing.size(), fmt::join(found.missing, ", "));
  }
  std::vector<std::unique_ptr<TensorFile>> result;
  if (!found.dense.empty()) {
    result.push_back(std::make_unique<DenseFile>(InputFile(index_), std::move(found.dense)));
  }
  if (!found.zarr.empty()) {
    result.push_back(std::make_unique<ZarrFile>(index_, std::move(found.zarr), std::move(found.arrays)));
  }
  return result;
}

std::optional<index_t> T5xCheckpoint::step() const {
  const MsgpackValue* step = branch(kStep);
  if (step == nullptr) return std::nullopt;
  if (step->kind == Kind::kInteger && step->integer >= 0) return step->integer;
  // Its type and shape first: whatever else may lie there is neither read nor counted.
  const auto is_step = [](StoredType type, const std::vector<index_t>& shape) {
    return (type == StoredType::kI32 || type == StoredType::kI64) && shape.empty();
  };
  std::vector<std::byte> bytes;
  StoredType type = StoredType::kI32;
  if (step->kind == Kind::kArray && type_of_numpy(step->type_name) &&
      is_step(step->array.type, step->array.shape)) {
    type = step->array.type;
    bytes.resize(static_cast<std::size_t>(size_of(type)));
    InputFile(index_).read(step->array.begin, bytes);
  } else if (is_description(*step)) {
    const ZarrArray array = zarr_array({"step", step}, /*zeros=*/true);
    type = array.metadata().type;
    if (!is_step(type, array.metadata().shape)) return std::nullopt;
    const ChunkBytes chunk = array.read_chunk(0, 0);
    if (chunk == nullptr) return 0;
    bytes = *chunk;
  }
  const auto number = [&bytes]<class T>(T value) -> std::optional<index_t> {
    if (bytes.size() != sizeof(T)) return std::nullopt;
    std::memcpy(&value, bytes.data(), sizeof(T));
    if (value < 0) return std::nullopt;
    return value;
  };
  if (type == StoredType::kI32) return number(std::int32_t{});
  if (type == StoredType::kI64) return number(std::int64_t{});
  return std::nullopt;
}

std::vector<std::unique_ptr<TensorFile>> T5xCheckpoint::parameters() const {
  Found found;
  for (const Leaf& leaf : leaves(kTarget)) {
    const OtherName name = name_of_t5x(leaf.path).value_or(OtherName{.name = leaf.path});
    add(found, leaf, name.name, name.transposed, /*zeros=*/false);
  }
  return files(std::move(found));
}

// As it is in the file.
std::vector<index_t> T5xCheckpoint::shape_of(const Leaf& leaf) const {
  if (!is_description(*leaf.value)) return leaf.value->array.shape;
  const MsgpackValue* metadata = leaf.value->find("metadata");
  const MsgpackValue* shape = metadata == nullptr ? nullptr : metadata->find("shape");
  if (shape == nullptr) return zarr_array(leaf, true).metadata().shape;
  std::vector<index_t> result;
  for (const MsgpackValue& extent : shape->list) result.push_back(extent.integer);
  return result;
}

std::vector<T5xCheckpoint::Slot> T5xCheckpoint::slots() const {
  std::map<std::string, Leaf> targets;
  for (const Leaf& leaf : leaves(kTarget)) targets.emplace(leaf.path, leaf);
  std::vector<Slot> result;
  for (const Leaf& leaf : leaves(kStates)) {
    const std::size_t cut = leaf.path.rfind('/');
    if (cut == std::string::npos) continue;
    const std::string path = leaf.path.substr(0, cut), slot = leaf.path.substr(cut + 1);
    const std::optional<OtherName> name = name_of_t5x(path);
    const auto target = targets.find(path);
    if (!name || target == targets.end() || (slot != "v" && slot != "v_row" && slot != "v_col")) continue;
    if (!is_dummy(shape_of(leaf))) result.push_back({leaf, target->second, *name, slot});
  }
  return result;
}

bool T5xCheckpoint::has_moments() const { return !slots().empty(); }

std::vector<std::unique_ptr<TensorFile>> T5xCheckpoint::moments() const {
  Found found;
  for (const auto& [leaf, target, name, slot] : slots()) {
    if (slot == "v") {
      add(found, leaf, name.name + ".second_moment", name.transposed, /*zeros=*/true);
      continue;
    }
    const std::vector<index_t> shape = shape_of(target);
    if (shape.size() != 2) {
      throw UserError("{}: '{}' has a factored moment, but the shape {}", index_.string(),
                      printable(target.path), shape_text(shape));
    }
    const bool of_rows = slot == factored_slots(shape, name.transposed).row;
    add(found, leaf, name.name + (of_rows ? ".second_moment_row" : ".second_moment_column"), false,
        /*zeros=*/true);
  }
  return files(std::move(found));
}

std::vector<std::unique_ptr<TensorFile>> open_t5x(const std::filesystem::path& index,
                                                  const std::string& stem) {
  const T5xCheckpoint checkpoint(index);
  if (stem == "model") return checkpoint.parameters();
  if (stem == "optimizer") return checkpoint.moments();
  return {};
}

}  // namespace regroup
