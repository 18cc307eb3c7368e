#include "trainer/formats/chunk_cache.h"

namespace regroup {

ChunkBytes ChunkCache::get(const std::string& key, std::uint64_t size,
                           const std::function<void(std::vector<std::byte>& bytes)>& load) {
  constexpr std::uint64_t kOverhead = 512;  // of an entry, about: its key twice, nodes, headers
  const auto known = places_.find(key);
  if (known != places_.end()) {
    entries_.splice(entries_.begin(), entries_, known->second);
    return entries_.front().bytes;
  }
  const std::uint64_t cost = size + kOverhead;
  while (!entries_.empty() && bytes_ + cost > budget_) {
    bytes_ -= entries_.back().cost;
    places_.erase(entries_.back().key);
    entries_.pop_back();
  }
  ++loads_;
  const auto bytes = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(size));
  load(*bytes);
  if (cost > budget_) return bytes;
  entries_.push_front({.key = key, .cost = cost, .bytes = bytes});
  places_.emplace(key, entries_.begin());
  bytes_ += cost;
  return bytes;
}

}  // namespace regroup
