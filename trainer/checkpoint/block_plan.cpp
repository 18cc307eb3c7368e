#include "trainer/checkpoint/block_plan.h"

#include <algorithm>
#include <tuple>

#include <fmt/ranges.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// A scalar lies in a file as one row of one.
std::vector<index_t> rows_of(const std::vector<index_t>& shape) {
  return shape.empty() ? std::vector<index_t>{1} : shape;
}

void check_local(const ShardedTensor& tensor) {
  const auto expected = local_shape(tensor.slice, tensor.shape);
  const Tensor& local = tensor.local;
  check(
      local.data != nullptr && local.is_contiguous() &&
          std::equal(expected.begin(), expected.end(), local.shape.begin(), local.shape.begin() + local.rank),
      "the slice of '{}' to be stored is {}, not a dense [{}]", tensor.name, local.describe(),
      fmt::join(expected, ", "));
}

// Everything about the table that must be the same on all ranks, as one number.
std::uint64_t fingerprint(const std::vector<ShardedTensor>& tensors) {
  std::string text;
  for (const ShardedTensor& t : tensors) {
    text += fmt::format("{}|{}|{}\n", t.name, name_of(t.local.dtype), fmt::join(t.shape, ","));
  }
  return checksum(std::as_bytes(std::span(text.data(), text.size())));
}

// Who writes a block, as long as the writers before it are known.
class WriterChoice {
 public:
  explicit WriterChoice(int tp_size) : bytes_of_rank_(static_cast<std::size_t>(tp_size)) {}

  int writer(const FilePlan& files, const std::vector<HeldTensor>& held, const Block& block) {
    std::vector<std::uint64_t> has(bytes_of_rank_.size());
    for_each_part(files, block,
                  [&](std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::uint64_t) {
                    for (std::size_t rank = 0; rank < has.size(); ++rank) {
                      const SliceRuns& runs = held[tensor].runs[rank];
                      has[rank] += runs.before(end) - runs.before(begin);
                    }
                  });
    const std::uint64_t most = *std::max_element(has.begin(), has.end());
    std::size_t chosen = has.size();
    for (std::size_t rank = 0; rank < has.size(); ++rank) {
      if (has[rank] < most - most / 4) continue;  // nearly as much is as good: then the one with least to do
      if (chosen == has.size() || bytes_of_rank_[rank] < bytes_of_rank_[chosen]) chosen = rank;
    }
    bytes_of_rank_[chosen] += block.bytes;
    return static_cast<int>(chosen);
  }

 private:
  std::vector<std::uint64_t> bytes_of_rank_;
};

}  // namespace

std::vector<HeldTensor> gather_slices(const ProcessGroup& tp, const std::vector<ShardedTensor>& tensors) {
  constexpr std::size_t kFields = 4;
  tp.run_together([&] {
    for (const ShardedTensor& tensor : tensors) check_local(tensor);
  });
  std::vector<std::uint64_t> mine = {fingerprint(tensors)};
  for (const ShardedTensor& t : tensors) {
    // A whole tensor always counts as cut along dimension 0.
    const bool whole = t.slice.whole(t.shape);
    const index_t dim = whole ? 0 : t.slice.dim;
    const index_t begin = whole ? 0 : t.slice.begin;
    const index_t end = whole ? rows_of(t.shape)[0] : t.slice.end;
    for (const index_t field : {dim, begin, end, index_t{t.slice.replica}}) {
      mine.push_back(static_cast<std::uint64_t>(field));
    }
  }
  const auto lists = tp.all_gather(mine);
  std::vector<HeldTensor> held(tensors.size());
  std::vector<Contribution> contributions;
  for (std::size_t rank = 0; rank < lists.size(); ++rank) {
    const auto& list = lists[rank];
    check(list[0] == lists[0][0] && list.size() == mine.size(),
          "rank {} would write other tensors than rank 0", rank);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::uint64_t* const fields = list.data() + 1 + i * kFields;
      const Contribution part{.rank = static_cast<int>(rank),
                              .tensor = i,
                              .dim = static_cast<int>(fields[0]),
                              .begin = static_cast<index_t>(fields[1]),
                              .end = static_cast<index_t>(fields[2])};
      const bool gives = fields[3] == 0;
      if (gives) contributions.push_back(part);
      held[i].gives.push_back(gives);
      held[i].runs.push_back(runs_of(rows_of(tensors[i].shape), size_of(tensors[i].local.dtype), part.dim,
                                     part.begin, part.end));
    }
  }
  check_exact_cover(tensors, std::move(contributions));
  return held;
}

std::vector<Block> plan_blocks(const FilePlan& files, const std::vector<HeldTensor>& held,
                               const Layout& layout, std::uint64_t block_bytes) {
  std::vector<Block> blocks;
  for (std::size_t f = 0; f < files.files.size(); ++f) {
    for (std::uint64_t begin = 0; begin < files.files[f].bytes; begin += block_bytes) {
      blocks.push_back(
          {.file = f, .begin = begin, .bytes = std::min(block_bytes, files.files[f].bytes - begin)});
    }
  }
  const auto dp = static_cast<std::size_t>(layout.data_parallel);
  for (std::size_t replica = 0; replica < dp; ++replica) {
    WriterChoice choice(layout.tensor_parallel);
    std::vector<std::size_t> slots(static_cast<std::size_t>(layout.tensor_parallel));
    for (std::size_t i = blocks.size() * replica / dp; i < blocks.size() * (replica + 1) / dp; ++i) {
      blocks[i].dp_rank = static_cast<int>(replica);
      blocks[i].tp_rank = choice.writer(files, held, blocks[i]);
      blocks[i].slot = slots[static_cast<std::size_t>(blocks[i].tp_rank)]++;
    }
  }
  return blocks;
}

std::vector<std::uint64_t> file_checksums(const FilePlan& files, const std::vector<Block>& blocks,
                                          const std::vector<std::vector<std::uint64_t>>& of_rank,
                                          int tp_size) {
  std::vector<std::uint64_t> result;
  auto block = blocks.begin();
  for (std::size_t f = 0; f < files.files.size(); ++f) {
    std::vector<std::uint64_t> of_file;
    for (; block != blocks.end() && block->file == f; ++block) {
      of_file.push_back(
          of_rank[static_cast<std::size_t>(block->dp_rank * tp_size + block->tp_rank)][block->slot]);
    }
    result.push_back(checksum(std::as_bytes(std::span(of_file))));
  }
  return result;
}

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

}  // namespace regroup
