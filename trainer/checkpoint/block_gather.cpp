#include "trainer/checkpoint/block_gather.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "kernels/base/error.h"

namespace regroup {
namespace {

constexpr std::uint64_t kWindowBytes = std::uint64_t{64} << 20;

}  // namespace

BlockGather::BlockGather(ProcessGroup tp, Backend& backend, const FilePlan& files,
                         std::vector<ShardedTensor> tensors, std::vector<HeldTensor> held,
                         std::vector<Block> blocks, std::size_t slots)
    : tp_(std::move(tp)),
      backend_(backend),
      files_(files),
      tensors_(std::move(tensors)),
      held_(std::move(held)),
      blocks_(std::move(blocks)),
      slots_(slots),
      send_bytes_(static_cast<std::size_t>(tp_.size())),
      receive_bytes_(send_bytes_.size()) {
  check(slots > 0, "blocks are gathered without staging memory");
  // Every writer's first blocks, then their second ones: in a window all of them have something to copy.
  std::stable_sort(blocks_.begin(), blocks_.end(),
                   [](const Block& a, const Block& b) { return a.slot < b.slot; });
  plan_windows();
}

void BlockGather::plan_windows() {
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    if (round_of(blocks_[i]) == windows_.size()) windows_.emplace_back();
    std::vector<Window>& round = windows_.back();
    const bool fits = !round.empty() && blocks_[i].bytes * (i - round.back().first) < kWindowBytes;
    if (!fits) round.push_back({.first = i, .last = i});
    round.back().last = i + 1;
  }
  if (tp_.size() == 1) return;
  const auto me = static_cast<std::size_t>(tp_.rank());
  std::uint64_t most_sent = 0, most_received = 0, largest_block = 0;
  for (const auto& round : windows_) {
    for (const Window& window : round) {
      std::uint64_t sent = 0, received = 0;
      for (std::size_t i = window.first; i < window.last; ++i) {
        const auto writer = static_cast<std::size_t>(blocks_[i].tp_rank);
        largest_block = std::max(largest_block, blocks_[i].bytes);
        for_each_part(files_, blocks_[i],
                      [&](std::size_t t, std::uint64_t begin, std::uint64_t end, std::uint64_t) {
                        for (std::size_t source = 0; source < send_bytes_.size(); ++source) {
                          if (source == writer || !held_[t].gives_to(source, writer)) continue;
                          const std::uint64_t bytes =
                              held_[t].runs[source].before(end) - held_[t].runs[source].before(begin);
                          if (source == me) sent += bytes;
                          if (writer == me) received += bytes;
                        }
                      });
      }
      most_sent = std::max(most_sent, sent);
      most_received = std::max(most_received, received);
    }
  }
  const auto reserve = [this](std::uint64_t bytes) {
    Buffer memory = backend_.allocate_host(static_cast<index_t>(bytes));
    if (bytes > 0) std::memset(memory.data(), 0, bytes);  // all of it is there from now on
    return memory;
  };
  sent_ = reserve(most_sent);
  received_ = reserve(most_received);
  if (!backend_.host_accessible()) bounce_ = reserve(largest_block);
}

std::vector<Block> BlockGather::mine(std::size_t round) const {
  std::vector<Block> result;
  for (const Block& block : blocks_) {
    if (block.tp_rank == tp_.rank() && round_of(block) == round) result.push_back(block);
  }
  return result;
}

void BlockGather::gather(std::size_t round, std::byte* staging, std::uint64_t stride) {
  for (const Window& window : windows_[round]) {
    if (tp_.size() > 1) exchange(window);
    place(window, staging, stride);
  }
}

// Sends what this rank has of the others' blocks, and receives what they have of its own: both in the order
// of blocks and tensors, so that nothing else needs to be told.
void BlockGather::exchange(const Window& window) {
  const auto me = static_cast<std::size_t>(tp_.rank());
  auto* const sent = static_cast<std::byte*>(sent_.data());
  std::uint64_t filled = 0;
  std::fill(receive_bytes_.begin(), receive_bytes_.end(), 0);
  for (std::size_t rank = 0; rank < send_bytes_.size(); ++rank) {
    const std::uint64_t first = filled;
    for (std::size_t i = window.first; i < window.last; ++i) {
      const Block& block = blocks_[i];
      const auto writer = static_cast<std::size_t>(block.tp_rank);
      if (writer != rank && writer != me) continue;
      for_each_part(files_, block, [&](std::size_t t, std::uint64_t begin, std::uint64_t end, std::uint64_t) {
        const HeldTensor& tensor = held_[t];
        const std::size_t source = writer == me ? rank : me;
        if (source == writer || !tensor.gives_to(source, writer)) return;
        const std::uint64_t bytes = tensor.runs[source].before(end) - tensor.runs[source].before(begin);
        if (writer == me) {
          receive_bytes_[rank] += bytes;
        } else {
          copy_to_host(t, begin, end, sent + filled);
          filled += bytes;
        }
      });
    }
    send_bytes_[rank] = filled - first;
  }
  tp_.all_to_all(sent, send_bytes_, static_cast<std::byte*>(received_.data()), receive_bytes_);
}

void BlockGather::place(const Window& window, std::byte* staging, std::uint64_t stride) {
  const auto me = static_cast<std::size_t>(tp_.rank());
  std::vector<const std::byte*> next(receive_bytes_.size(), static_cast<const std::byte*>(received_.data()));
  for (std::size_t rank = 1; rank < next.size(); ++rank)
    next[rank] = next[rank - 1] + receive_bytes_[rank - 1];
  for (std::size_t i = window.first; i < window.last; ++i) {
    const Block& block = blocks_[i];
    if (block.tp_rank != tp_.rank()) continue;
    std::byte* const to = place_of(block, staging, stride);
    const std::string& header = files_.files[block.file].header;
    if (block.begin < header.size()) {
      std::memcpy(to, header.data() + block.begin, std::min(header.size() - block.begin, block.bytes));
    }
    for_each_part(files_, block,
                  [&](std::size_t t, std::uint64_t begin, std::uint64_t end, std::uint64_t at) {
                    const HeldTensor& tensor = held_[t];
                    copy_local(t, begin, end, to + at);
                    for (std::size_t source = 0; source < next.size(); ++source) {
                      if (source == me || !tensor.gives_to(source, me)) continue;
                      const SliceRuns& runs = tensor.runs[source];
                      scatter(runs, begin, end, next[source], to + at);
                      next[source] += runs.before(end) - runs.before(begin);
                    }
                  });
  }
}

// This rank's part of [begin, end) of a tensor, into the block's memory of that range.
void BlockGather::copy_local(std::size_t t, std::uint64_t begin, std::uint64_t end, std::byte* block) {
  const SliceRuns& runs = held_[t].runs[static_cast<std::size_t>(tp_.rank())];
  const std::uint64_t from = runs.before(begin);
  const std::uint64_t bytes = runs.before(end) - from;
  if (bytes == end - begin) {
    copy_to_host(t, begin, end, block);
  } else if (backend_.host_accessible()) {
    scatter(runs, begin, end, static_cast<const std::byte*>(tensors_[t].local.data) + from, block);
  } else {
    auto* const dense = static_cast<std::byte*>(bounce_.data());
    copy_to_host(t, begin, end, dense);
    scatter(runs, begin, end, dense, block);
  }
}

// This rank's part of [begin, end) of a tensor, dense.
void BlockGather::copy_to_host(std::size_t t, std::uint64_t begin, std::uint64_t end, std::byte* host) {
  const SliceRuns& runs = held_[t].runs[static_cast<std::size_t>(tp_.rank())];
  const Tensor& local = tensors_[t].local;
  const auto width = static_cast<std::uint64_t>(size_of(local.dtype));
  const std::uint64_t first = runs.before(begin);
  const std::uint64_t last = runs.before(end);
  check(first % width == 0 && last % width == 0, "a block cuts an element of '{}'", tensors_[t].name);
  if (first == last) return;
  if (backend_.host_accessible()) {
    std::memcpy(host, static_cast<const std::byte*>(local.data) + first, last - first);
    return;
  }
  const Tensor flat(local.data, local.dtype, {local.numel()});
  backend_.copy_to_host(
      flat.slice(0, static_cast<index_t>(first / width), static_cast<index_t>(last / width)), host);
}

void BlockGather::scatter(const SliceRuns& runs, std::uint64_t begin, std::uint64_t end,
                          const std::byte* from, std::byte* to) {
  runs.for_each_within(begin, end, [&](std::uint64_t at, std::uint64_t bytes) {
    std::memcpy(to + (at - begin), from, bytes);
    from += bytes;
  });
}

}  // namespace regroup
