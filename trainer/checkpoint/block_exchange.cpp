#include "trainer/checkpoint/block_exchange.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "kernels/base/error.h"

namespace regroup {

BlockMemory::BlockMemory(Backend& backend, std::uint64_t bytes, std::span<std::byte> lent) {
  void* memory = lent.data();
  std::size_t room = lent.size();
  if (lent.empty() || std::align(kDirectAlignment, bytes, memory, room) == nullptr) {
    own_ = backend.allocate_host(static_cast<index_t>(bytes + kDirectAlignment));
    memory = own_.data();
    room = static_cast<std::size_t>(own_.bytes());
    std::memset(memory, 0, room);
    std::align(kDirectAlignment, bytes, memory, room);
  }
  data_ = static_cast<std::byte*>(memory);
}

template <class Work>
void BlockExchange::for_each_travelling(std::size_t i, std::size_t peer, Work&& work) const {
  const Block& block = parts_.blocks[i];
  for_each_part(
      parts_.files, block, [&](std::size_t t, std::uint64_t begin, std::uint64_t end, std::uint64_t at) {
        const HeldTensor& tensor = parts_.held[t];
        // Everybody needs its own copy of what it holds, the owner but one of equal ones.
        if (direction_ == Direction::kToOwner && !tensor.gives_to(peer, owner(i))) return;
        const std::uint64_t bytes = tensor.runs[peer].within(begin, end);
        if (bytes == 0) return;
        work(Part{.block = block, .tensor = t, .begin = begin, .end = end, .at = at, .peer = peer}, bytes);
      });
}

template <class Work>
void BlockExchange::for_each_between(const Window& window, std::size_t owner_rank, std::size_t peer,
                                     Work&& work) const {
  if (owner_rank == peer) return;
  for (std::size_t i = window.first; i < window.last; ++i) {
    if (owner(i) == owner_rank) for_each_travelling(i, peer, work);
  }
}

template <class Work>
void BlockExchange::for_each_sent(const Window& window, std::size_t rank, Work&& work) const {
  const bool mine = direction_ == Direction::kFromOwner;
  for_each_between(window, mine ? me() : rank, mine ? rank : me(), work);
}

template <class Work>
void BlockExchange::for_each_received(const Window& window, std::size_t rank, Work&& work) const {
  const bool mine = direction_ == Direction::kToOwner;
  for_each_between(window, mine ? me() : rank, mine ? rank : me(), work);
}

BlockExchange::BlockExchange(Parts parts, Direction direction, std::size_t slots, std::uint64_t window_bytes)
    : parts_(std::move(parts)),
      direction_(direction),
      slots_(slots),
      send_bytes_(group_size()),
      receive_bytes_(group_size()) {
  check(slots > 0, "blocks are exchanged without staging memory");
  // Every owner's first blocks, then their second ones: in a window all of them have something to copy.
  std::stable_sort(parts_.blocks.begin(), parts_.blocks.end(),
                   [](const Block& a, const Block& b) { return a.slot < b.slot; });
  plan_windows(window_bytes);
  reserve_memory();
}

void BlockExchange::plan_windows(std::uint64_t window_bytes) {
  for (std::size_t i = 0; i < parts_.blocks.size(); ++i) {
    if (parts_.blocks[i].slot / slots_ == windows_.size()) windows_.emplace_back();
    std::vector<Window>& round = windows_.back();
    const bool fits = !round.empty() && parts_.blocks[i].bytes * (i + 1 - round.back().first) <= window_bytes;
    if (!fits) round.push_back({.first = i, .last = i});
    round.back().last = i + 1;
  }
  for (auto& round : windows_) {
    for (Window& window : round) window.travels = travels(window);
  }
}

bool BlockExchange::travels(const Window& window) const {
  bool any = false;
  for (std::size_t i = window.first; i < window.last && !any; ++i) {
    for (std::size_t peer = 0; peer < group_size(); ++peer) {
      if (peer != owner(i)) for_each_travelling(i, peer, [&](const Part&, std::uint64_t) { any = true; });
    }
  }
  return any;
}

void BlockExchange::reserve_memory() {
  if (group_size() == 1 && host_accessible()) return;
  std::uint64_t most_sent = 0, most_received = 0, largest_block = 0;
  for (const auto& round : windows_) {
    for (const Window& window : round) {
      std::uint64_t sent = 0, received = 0;
      for (std::size_t rank = 0; rank < group_size(); ++rank) {
        for_each_sent(window, rank, [&](const Part&, std::uint64_t bytes) { sent += bytes; });
        for_each_received(window, rank, [&](const Part&, std::uint64_t bytes) { received += bytes; });
      }
      most_sent = std::max(most_sent, sent);
      most_received = std::max(most_received, received);
    }
  }
  if (!host_accessible()) {
    for (const Block& block : parts_.blocks) largest_block = std::max(largest_block, block.bytes);
  }
  memory_ = BlockMemory(parts_.backend, largest_block + most_sent + most_received, parts_.memory);
  bounce_ = memory_.data();
  outgoing_ = bounce_ + largest_block;
  incoming_ = outgoing_ + most_sent;
}

std::vector<Block> BlockExchange::mine(std::size_t round) const {
  std::vector<Block> result;
  for (const Window& window : windows_[round]) {
    for (std::size_t i = window.first; i < window.last; ++i) {
      if (owner(i) == me()) result.push_back(parts_.blocks[i]);
    }
  }
  return result;
}

// Both sides go through blocks and tensors in the same order, so that nothing else needs to be told.
void BlockExchange::exchange(const Window& window, const Copy& pack, const Copy& place) {
  if (!window.travels) return;
  std::uint64_t filled = 0;
  for (std::size_t rank = 0; rank < group_size(); ++rank) {
    const std::uint64_t first = filled;
    for_each_sent(window, rank, [&](const Part& part, std::uint64_t bytes) {
      pack(part, outgoing_ + filled);
      filled += bytes;
    });
    send_bytes_[rank] = filled - first;
    receive_bytes_[rank] = 0;
    for_each_received(window, rank, [&](const Part&, std::uint64_t bytes) { receive_bytes_[rank] += bytes; });
  }
  parts_.tp.all_to_all(outgoing_, send_bytes_, incoming_, receive_bytes_);
  std::uint64_t taken = 0;
  for (std::size_t rank = 0; rank < group_size(); ++rank) {
    for_each_received(window, rank, [&](const Part& part, std::uint64_t bytes) {
      place(part, incoming_ + taken);
      taken += bytes;
    });
  }
}

void BlockExchange::copy_to_host(std::size_t t, std::uint64_t begin, std::uint64_t end, std::byte* host) {
  const Tensor part = local_part(t, begin, end);
  if (part.numel() == 0) return;
  if (host_accessible()) {
    std::memcpy(host, part.data, static_cast<std::size_t>(part.bytes()));
  } else {
    parts_.backend.copy_to_host(part, host);
  }
}

void BlockExchange::copy_from_host(std::size_t t, std::uint64_t begin, std::uint64_t end,
                                   const std::byte* host) {
  const Tensor part = local_part(t, begin, end);
  if (part.numel() == 0 || part.data == host) return;
  if (host_accessible()) {
    std::memcpy(part.data, host, static_cast<std::size_t>(part.bytes()));
  } else {
    parts_.backend.copy_from_host(host, part);
  }
}

std::byte* BlockExchange::touchable(std::size_t t, std::uint64_t begin) const {
  if (!host_accessible()) return bounce_;
  return static_cast<std::byte*>(parts_.tensors[t].local.data) + runs(t, me()).before(begin);
}

// This rank's part of [begin, end) of a tensor.
Tensor BlockExchange::local_part(std::size_t t, std::uint64_t begin, std::uint64_t end) const {
  const Tensor& local = parts_.tensors[t].local;
  const auto width = static_cast<std::uint64_t>(size_of(local.dtype));
  const std::uint64_t first = runs(t, me()).before(begin);
  const std::uint64_t last = runs(t, me()).before(end);
  check(first % width == 0 && last % width == 0, "a block cuts an element of '{}'", parts_.tensors[t].name);
  const Tensor flat(local.data, local.dtype, {local.numel()});
  return flat.slice(0, static_cast<index_t>(first / width), static_cast<index_t>(last / width));
}

}  // namespace regroup
