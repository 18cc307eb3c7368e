#include "trainer/formats/file_plan.h"

#include <functional>
#include <numeric>
#include <unordered_map>

#include "kernels/base/error.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

std::uint64_t bytes_of(const StoredTensor& tensor) {
  const std::optional<std::uint64_t> bytes = stored_bytes(tensor.type, tensor.shape);
  check(bytes.has_value(), "'{}' of {} cannot be stored", tensor.name, shape_text(tensor.shape));
  return *bytes;
}

// Which tensors go into which file: in order, a new file where the next would exceed `limit`.
std::vector<std::vector<std::size_t>> split_into_files(std::span<const StoredTensor> tensors,
                                                       std::uint64_t limit) {
  std::vector<std::vector<std::size_t>> files(1);
  std::uint64_t filled = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t bytes = bytes_of(tensors[i]);
    if (!files.back().empty() && filled + bytes > limit) {
      files.emplace_back();
      filled = 0;
    }
    files.back().push_back(i);
    filled += bytes;
  }
  return files;
}

// `first`: the number of the set's first tensor.
PlannedFile plan_file(std::string name, std::span<const StoredTensor> tensors,
                      const std::vector<std::size_t>& members, std::size_t first, const Metadata& metadata) {
  std::vector<StoredTensor> stored;
  std::unordered_map<std::string, std::size_t> numbers;
  for (const std::size_t i : members) {
    stored.push_back(tensors[i]);
    numbers.emplace(tensors[i].name, first + i);
  }
  SafetensorsPlan plan = plan_safetensors(std::move(stored), metadata);
  PlannedFile file{.name = std::move(name), .header = std::move(plan.bytes), .bytes = plan.file_size};
  for (const StoredTensor& t : plan.tensors) {
    file.tensors.push_back({.tensor = numbers.at(t.name), .begin = t.begin, .end = t.end});
  }
  return file;
}

// Adds a set's files, whose first tensor has the number `first`.
void add_files(FilePlan& plan, const std::string& stem, std::span<const StoredTensor> tensors,
               std::size_t first, const FileOptions& options) {
  const auto files = split_into_files(tensors, options.max_file_bytes);
  nlohmann::json weight_map = nlohmann::json::object();
  std::uint64_t total = 0;
  for (std::size_t k = 0; k < files.size(); ++k) {
    const std::string name = files.size() == 1
                                 ? stem + ".safetensors"
                                 : fmt::format("{}-{:05}-of-{:05}.safetensors", stem, k + 1, files.size());
    plan.files.push_back(plan_file(name, tensors, files[k], first, options.metadata));
    for (const std::size_t i : files[k]) {
      weight_map[tensors[i].name] = name;
      total += bytes_of(tensors[i]);
    }
  }
  if (files.size() > 1) {
    const nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    plan.indexes.emplace(stem + ".safetensors.index.json", json_text(index, 2) + "\n");
  }
}

}  // namespace

std::vector<ShardedTensor> all_tensors(std::span<const TensorSet> sets) {
  std::vector<ShardedTensor> all;
  for (const TensorSet& set : sets) all.insert(all.end(), set.tensors.begin(), set.tensors.end());
  return all;
}

std::uint64_t global_bytes(const ShardedTensor& tensor) {
  return static_cast<std::uint64_t>(std::accumulate(tensor.shape.begin(), tensor.shape.end(),
                                                    size_of(tensor.local.dtype), std::multiplies<>()));
}

std::uint64_t FilePlan::bytes() const {
  return std::accumulate(files.begin(), files.end(), std::uint64_t{0},
                         [](std::uint64_t sum, const PlannedFile& file) { return sum + file.bytes; });
}

FilePlan plan_files(std::span<const TensorSet> sets, const FileOptions& options) {
  FilePlan plan;
  std::size_t first = 0;
  for (const TensorSet& set : sets) {
    std::vector<StoredTensor> tensors;
    for (const ShardedTensor& t : set.tensors) {
      tensors.push_back({.name = t.name, .type = stored_type(t.local.dtype), .shape = t.shape});
    }
    add_files(plan, set.stem, tensors, first, options);
    first += tensors.size();
  }
  return plan;
}

FilePlan plan_files(const std::string& stem, std::span<const StoredTensor> tensors,
                    const FileOptions& options) {
  FilePlan plan;
  add_files(plan, stem, tensors, 0, options);
  return plan;
}

}  // namespace regroup
