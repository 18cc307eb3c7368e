#include "trainer/checkpoint/sharded_io.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "parallel/mpi_file.h"

namespace regroup {
namespace {

// A scalar lies in a file as one row of one.
std::vector<index_t> rows_of(const std::vector<index_t>& shape) {
  return shape.empty() ? std::vector<index_t>{1} : shape;
}

std::uint64_t bytes_of(const ShardedTensor& t) {
  return static_cast<std::uint64_t>(
      std::accumulate(t.shape.begin(), t.shape.end(), size_of(t.local.dtype), std::multiplies<>()));
}

// The part of tensor number `index` that `rank` would write; a whole tensor always counts as cut along
// dimension 0.
Contribution contribution_of(const ShardedTensor& tensor, std::size_t index, int rank) {
  const Slice& slice = tensor.slice;
  if (slice.whole(tensor.shape)) {
    return {.rank = rank, .tensor = index, .dim = 0, .begin = 0, .end = rows_of(tensor.shape)[0]};
  }
  return {.rank = rank, .tensor = index, .dim = slice.dim, .begin = slice.begin, .end = slice.end};
}

bool contributes(const ShardedTensor& tensor, bool writes) {
  return writes && tensor.slice.replica == 0 && tensor.local.data != nullptr;
}

void check_local(const ShardedTensor& tensor) {
  const auto expected = local_shape(tensor.slice, tensor.shape);
  const Tensor& local = tensor.local;
  check(local.is_contiguous() && std::equal(expected.begin(), expected.end(), local.shape.begin(),
                                            local.shape.begin() + local.rank),
        "the slice of '{}' to be stored is {}, not a dense [{}]", tensor.name, local.describe(),
        fmt::join(expected, ", "));
}

// Everything about the table that must be the same on all ranks, as one number.
std::uint64_t fingerprint(std::span<const ShardedTensor> tensors) {
  std::string text;
  for (const ShardedTensor& t : tensors) {
    text += fmt::format("{}|{}|{}\n", t.name, name_of(t.local.dtype), fmt::join(t.shape, ","));
  }
  return checksum(std::as_bytes(std::span(text.data(), text.size())));
}

// Every rank's contributions, on every rank, in one exchange.
std::vector<Contribution> gather_contributions(const ProcessGroup& group,
                                               std::span<const ShardedTensor> tensors, bool writes) {
  constexpr std::size_t kFields = 4;
  std::vector<std::uint64_t> mine = {fingerprint(tensors)};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!contributes(tensors[i], writes)) continue;
    const Contribution c = contribution_of(tensors[i], i, group.rank());
    for (const auto field : {static_cast<index_t>(i), static_cast<index_t>(c.dim), c.begin, c.end}) {
      mine.push_back(static_cast<std::uint64_t>(field));
    }
  }
  const auto lists = group.all_gather(mine);
  std::vector<Contribution> all;
  for (std::size_t rank = 0; rank < lists.size(); ++rank) {
    const auto& list = lists[rank];
    check(list[0] == lists[0][0], "rank {} would write other tensors than rank 0", rank);
    for (std::size_t at = 1; at < list.size(); at += kFields) {
      all.push_back({.rank = static_cast<int>(rank),
                     .tensor = static_cast<std::size_t>(list[at]),
                     .dim = static_cast<int>(list[at + 1]),
                     .begin = static_cast<index_t>(list[at + 2]),
                     .end = static_cast<index_t>(list[at + 3])});
    }
  }
  return all;
}

// Which tensors go into which file: in order, a new file where the next would exceed `limit`.
std::vector<std::vector<std::size_t>> split_into_files(std::span<const ShardedTensor> tensors,
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

void write_file(const ProcessGroup& group, const std::filesystem::path& path,
                std::span<const ShardedTensor> tensors, const std::vector<std::size_t>& members, bool writes,
                const Metadata& metadata) {
  std::vector<StoredTensor> stored;
  std::map<std::string, const ShardedTensor*> by_name;
  for (const std::size_t i : members) {
    const ShardedTensor& t = tensors[i];
    stored.push_back({.name = t.name, .type = stored_type(t.local.dtype), .shape = t.shape});
    by_name.emplace(t.name, &t);
  }
  SafetensorsPlan plan = plan_safetensors(std::move(stored), metadata);
  std::vector<FileBlock> blocks;
  if (group.rank() == 0) {
    const auto length = static_cast<index_t>(plan.bytes.size());
    blocks.push_back({.offset = 0,
                      .shape = {length},
                      .element_bytes = 1,
                      .dim = 0,
                      .begin = 0,
                      .end = length,
                      .memory = reinterpret_cast<std::byte*>(plan.bytes.data())});
  }
  for (const StoredTensor& at : plan.tensors) {
    const ShardedTensor& t = *by_name.at(at.name);
    if (!contributes(t, writes) || at.begin == at.end) continue;
    const Contribution part = contribution_of(t, 0, group.rank());
    blocks.push_back({.offset = at.begin,
                      .shape = rows_of(t.shape),
                      .element_bytes = size_of(t.local.dtype),
                      .dim = part.dim,
                      .begin = part.begin,
                      .end = part.end,
                      .memory = static_cast<std::byte*>(t.local.data)});
  }
  write_collectively(group, path, plan.file_size, std::move(blocks));
}

}  // namespace

void check_exact_cover(std::span<const ShardedTensor> table, std::vector<Contribution> contributions) {
  std::sort(contributions.begin(), contributions.end(), [](const Contribution& a, const Contribution& b) {
    return std::tie(a.tensor, a.begin, a.end, a.rank) < std::tie(b.tensor, b.begin, b.end, b.rank);
  });
  auto next = contributions.begin();
  for (std::size_t i = 0; i < table.size(); ++i) {
    const std::string& name = table[i].name;
    const auto shape = rows_of(table[i].shape);
    const int dim = next != contributions.end() && next->tensor == i ? next->dim : 0;
    check(0 <= dim && dim < static_cast<int>(shape.size()), "'{}' has no dimension {}", name, dim);
    const index_t extent = shape[static_cast<std::size_t>(dim)];
    index_t end = 0;
    for (; next != contributions.end() && next->tensor == i; ++next) {
      check(next->dim == dim, "'{}' is cut along dimension {} by rank {}, but along {} by others", name,
            next->dim, next->rank, dim);
      check(next->begin >= end,
            "[{}, {}) of dimension {} of '{}', written by rank {}, is written by another rank too",
            next->begin, std::min(end, next->end), dim, name, next->rank);
      check(next->end <= extent && next->end >= next->begin,
            "rank {} writes [{}, {}) of dimension {} of '{}', which has {}", next->rank, next->begin,
            next->end, dim, name, extent);
      check(next->begin == end, "[{}, {}) of dimension {} of '{}' is written by no rank", end, next->begin,
            dim, name);
      end = next->end;
    }
    const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
    check(end == extent || (empty && end <= extent), "[{}, {}) of dimension {} of '{}' is written by no rank",
          end, extent, dim, name);
  }
  check(next == contributions.end(), "a rank writes tensor number {} of {}",
        next == contributions.end() ? 0 : next->tensor, table.size());
}

std::vector<std::string> write_tensors(const ProcessGroup& group, const std::filesystem::path& directory,
                                       const std::string& stem, std::span<const ShardedTensor> tensors,
                                       bool writes, const WriteOptions& options) {
  group.run_together([&] {
    for (const ShardedTensor& t : tensors) {
      if (contributes(t, writes)) check_local(t);
    }
  });
  check_exact_cover(tensors, gather_contributions(group, tensors, writes));
  const auto files = split_into_files(tensors, options.max_file_bytes);
  std::vector<std::string> names;
  nlohmann::json weight_map = nlohmann::json::object();
  std::uint64_t total = 0;
  for (std::size_t k = 0; k < files.size(); ++k) {
    names.push_back(files.size() == 1
                        ? stem + ".safetensors"
                        : fmt::format("{}-{:05}-of-{:05}.safetensors", stem, k + 1, files.size()));
    write_file(group, directory / names.back(), tensors, files[k], writes, options.metadata);
    for (const std::size_t i : files[k]) {
      weight_map[tensors[i].name] = names.back();
      total += bytes_of(tensors[i]);
    }
  }
  if (files.size() == 1) return names;
  names.push_back(stem + ".safetensors.index.json");
  const nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  group.run_on(0, [&] { write_text(directory / names.back(), index.dump(2) + "\n"); });
  return names;
}

}  // namespace regroup
