#include "trainer/formats/checkpoint_reader.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <string_view>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/formats/bounded_json.h"
#include "trainer/formats/safetensors.h"
#include "trainer/formats/t5x.h"
#include "trainer/formats/torch_file.h"

namespace regroup {
namespace {

// What a checkpoint's file is called in its directory, and how the names of its parts end where an index
// names several. PyTorch's are a model's only, and second to safetensors.
struct FileName {
  std::string single, suffix;
};
constexpr const char* kIndexSuffix = ".index.json";

std::vector<FileName> file_names(const std::string& stem) {
  std::vector<FileName> names = {{stem + ".safetensors", ".safetensors"}};
  if (stem == "model") names.push_back({"pytorch_model.bin", ".bin"});
  return names;
}

// Whether transformers may have stored it beside what the model needs.
bool is_ignorable(std::string_view name) {
  return name == "encoder.embed_tokens.weight" || name == "decoder.embed_tokens.weight" ||
         name == "lm_head.weight" || name.ends_with("EncDecAttention.relative_attention_bias.weight");
}

// {tensor: file} of an index file, whose names must be plain: nothing outside its directory is opened.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& index,
                                                   std::string_view suffix) {
  constexpr std::uint64_t kLimit = std::uint64_t{16} << 20;
  const std::string where = index.string();
  std::set<std::pair<std::string, std::string>> keys;  // of the root, and of its objects
  std::string root, twice;
  const auto note_key = [&](int depth, const std::string& key) {
    if (depth > 2) return;
    if (depth == 1) root = key;
    if (!keys.emplace(root, depth == 1 ? "" : key).second) twice = key;
  };
  const auto json = parse_bounded(read_text(index, kLimit), where, note_key);
  if (json.is_discarded()) throw UserError("{}: it is not valid JSON", where);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object() ||
      json["weight_map"].empty()) {
    throw UserError("{}: it has no \"weight_map\" of tensors to files", where);
  }
  if (!twice.empty()) throw UserError("{}: the key '{}' is there twice", where, printable(twice));
  std::map<std::string, std::string> result;
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    if (!file.is_string())
      throw UserError("{}: the file of tensor '{}' is not a text", where, printable(tensor));
    const auto name = file.get<std::string>();
    if (name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos || !name.ends_with(suffix)) {
      throw UserError("{}: the file of tensor '{}' must be the name of a {} file in the same directory",
                      where, printable(tensor), suffix);
    }
    result.emplace(tensor, name);
  }
  return result;
}

// "3 missing (a, b, c)"
void list(std::vector<std::string>& complaints, const char* what, const std::vector<std::string>& names) {
  if (names.empty()) return;
  complaints.push_back(fmt::format("{} {} ({})", names.size(), what, fmt::join(names, ", ")));
}

template <class Table>
std::map<std::string, std::vector<index_t>> shapes_of(const Table& table) {
  std::map<std::string, std::vector<index_t>> shapes;
  for (const auto& row : table) shapes.emplace(row.name, row.shape);
  return shapes;
}

}  // namespace

CheckpointReader::CheckpointReader(const std::filesystem::path& path, const std::string& stem,
                                   Caching caching)
    : path_(path), caching_(caching) {
  if (const auto index = t5x_index(path)) {
    for (auto& file : open_t5x(*index, stem)) add(std::move(file));
    return;
  }
  std::error_code ignored;
  if (std::filesystem::is_regular_file(path, ignored)) {
    add(open_file(path));
    return;
  }
  if (!std::filesystem::is_directory(path, ignored)) {
    throw UserError("there is no checkpoint at {}: no such file or directory", path.string());
  }
  std::vector<std::string> names;
  for (const auto& [single, suffix] : file_names(stem)) {
    const std::string index = single + kIndexSuffix;
    if (std::filesystem::exists(path / single, ignored)) {
      add(open_file(path / single));
      return;
    }
    if (std::filesystem::exists(path / index, ignored)) {
      open_indexed(path / index, suffix);
      return;
    }
    names.insert(names.end(), {single, index});
  }
  throw UserError("there is no checkpoint in {}: it has neither {}", path.string(),
                  fmt::join(names, " nor "));
}

CheckpointReader::CheckpointReader(std::filesystem::path path, std::vector<std::unique_ptr<TensorFile>> files)
    : path_(std::move(path)) {
  for (auto& file : files) add(std::move(file));
}

bool CheckpointReader::exists(const std::filesystem::path& directory, const std::string& stem) {
  if (const auto index = t5x_index(directory)) {
    return stem == "model" || (stem == "optimizer" && T5xCheckpoint(*index).has_moments());
  }
  std::error_code ignored;
  const auto names = file_names(stem);
  return std::any_of(names.begin(), names.end(), [&](const FileName& name) {
    return std::filesystem::is_regular_file(directory / name.single, ignored) ||
           std::filesystem::is_regular_file(directory / (name.single + kIndexSuffix), ignored);
  });
}

std::unique_ptr<TensorFile> CheckpointReader::open_file(const std::filesystem::path& path) {
  InputFile file(path);
  if (is_torch_file(file)) {
    std::vector<StoredTensor> tensors = read_torch_tensors(file);
    return std::make_unique<DenseFile>(std::move(file), std::move(tensors), caching_);
  }
  SafetensorsHeader header = read_safetensors_header(file);
  if (files_.empty()) metadata_ = std::move(header.metadata);
  return std::make_unique<DenseFile>(std::move(file), std::move(header.tensors), caching_);
}

void CheckpointReader::add(std::unique_ptr<TensorFile> file) {
  files_.push_back(std::move(file));
  const std::vector<StoredTensor>& tensors = files_.back()->tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto [at, fresh] = locations_.emplace(tensors[i].name, Location{files_.size() - 1, i});
    if (!fresh) {
      throw UserError("{}: the tensor '{}' is in {} too", files_.back()->path().string(), tensors[i].name,
                      files_[at->second.file]->path().string());
    }
  }
}

void CheckpointReader::open_indexed(const std::filesystem::path& index, std::string_view suffix) {
  const auto weight_map = read_weight_map(index, suffix);
  std::set<std::string> names;
  for (const auto& [tensor, file] : weight_map) names.insert(file);
  std::vector<std::string> missing;
  for (const std::string& name : names) {
    std::error_code ignored;
    if (!std::filesystem::exists(index.parent_path() / name, ignored)) missing.push_back(printable(name));
  }
  if (!missing.empty()) {
    throw UserError("{}: {} of the {} files that it names are missing: {}", index.string(), missing.size(),
                    names.size(), fmt::join(missing, ", "));
  }
  for (const std::string& name : names) add(open_file(index.parent_path() / name));
  for (const auto& [tensor, file] : weight_map) {
    const auto at = locations_.find(tensor);
    if (at == locations_.end() || files_[at->second.file]->path().filename() != file) {
      throw UserError("{}: the tensor '{}' is not in {}, where it should be", index.string(),
                      printable(tensor), file);
    }
  }
  for (const auto& [tensor, location] : locations_) {
    if (!weight_map.contains(tensor)) {
      throw UserError("{}: the tensor '{}' of {} is not in the index", index.string(), tensor,
                      files_[location.file]->path().filename().string());
    }
  }
}

std::vector<std::filesystem::path> CheckpointReader::files() const {
  std::vector<std::filesystem::path> paths;
  for (const auto& file : files_) paths.push_back(file->path());
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::vector<const StoredTensor*> CheckpointReader::tensors() const {
  std::vector<const StoredTensor*> all;
  for (const auto& [name, location] : locations_) all.push_back(&stored(location));
  return all;
}

const StoredTensor* CheckpointReader::find(const std::string& name) const {
  const auto at = locations_.find(name);
  return at == locations_.end() ? nullptr : &stored(at->second);
}

const std::filesystem::path& CheckpointReader::file_of(const std::string& name) const {
  return files_[locate(name).file]->path();
}

const CheckpointReader::Location& CheckpointReader::locate(const std::string& name) const {
  const auto at = locations_.find(name);
  if (at == locations_.end()) throw UserError("{}: there is no tensor '{}'", path_.string(), name);
  return at->second;
}

void CheckpointReader::require(std::span<const ParameterSpec> table) const {
  require_shapes(shapes_of(table));
}
void CheckpointReader::require(std::span<const ShardedTensor> table) const {
  require_shapes(shapes_of(table));
}

void CheckpointReader::require_shapes(const std::map<std::string, std::vector<index_t>>& expected) const {
  std::vector<std::string> missing, misshaped, integers, extra;
  for (const auto& [name, shape] : expected) {
    const StoredTensor* stored = find(name);
    if (stored == nullptr) {
      missing.push_back(name);
    } else if (stored->shape != shape) {
      misshaped.push_back(
          fmt::format("{}: {} instead of {}", name, shape_text(stored->shape), shape_text(shape)));
    } else if (!is_floating(stored->type)) {
      integers.push_back(fmt::format("{}: {}", name, name_of(stored->type)));
    }
  }
  for (const auto& [name, location] : locations_) {
    if (!expected.contains(name) && !is_ignorable(name)) extra.push_back(name);
  }
  std::vector<std::string> complaints;
  list(complaints, "missing", missing);
  list(complaints, "of another shape", misshaped);
  list(complaints, "of a type that is not floating point", integers);
  list(complaints, "unknown", extra);
  if (complaints.empty()) return;
  throw UserError("{}: these are not the {} tensors that the configuration asks for: {}", path_.string(),
                  expected.size(), fmt::join(complaints, "; "));
}

void CheckpointReader::read(const std::string& name, int dim, index_t begin, index_t end,
                            const Tensor& out) const {
  const Location& location = locate(name);
  const StoredTensor& stored = this->stored(location);
  const TensorFile& file = *files_[location.file];
  if (!is_floating(stored.type)) {
    throw UserError("{}: tensor '{}' is of type {}; F64, F32, F16 or BF16 is needed", file.path().string(),
                    name, name_of(stored.type));
  }
  std::vector<index_t> rows = stored.shape;
  if (rows.empty()) {  // a scalar: one row of one
    rows = {1};
    begin = 0;
    end = 1;
  }
  check(0 <= dim && dim < static_cast<int>(rows.size()) && 0 <= begin && begin <= end &&
            end <= rows[static_cast<std::size_t>(dim)],
        "[{}, {}) of dimension {} of '{}', which is {}", begin, end, dim, name, shape_text(stored.shape));
  auto expected = rows;
  expected[static_cast<std::size_t>(dim)] = end - begin;
  const auto count = std::accumulate(expected.begin(), expected.end(), index_t{1}, std::multiplies<>());
  check(out.is_contiguous() && out.numel() == count &&
            (stored.shape.empty() || (out.rank == static_cast<int>(expected.size()) &&
                                      std::equal(expected.begin(), expected.end(), out.shape.begin()))),
        "a slice of '{}' of shape {} is read into {}", name, shape_text(expected), out.describe());
  check(out.dtype == DType::kFloat32 || out.dtype == DType::kFloat64, "'{}' is read into {}", name,
        out.describe());
  if (count == 0) return;
  file.read(location.index, dim, begin, end, out);
}

void CheckpointReader::read(const ShardedTensor& destination) const {
  const Location& location = locate(destination.name);
  if (stored(location).shape != destination.shape) {
    throw UserError("{}: tensor '{}' has the shape {}; {} is needed", files_[location.file]->path().string(),
                    destination.name, shape_text(stored(location).shape), shape_text(destination.shape));
  }
  read(destination.name, destination.slice.dim, destination.slice.begin, destination.slice.end,
       destination.local);
}

}  // namespace regroup
