// The chunks of an opened checkpoint's arrays that were read last, decompressed: a slice across a chunk, one
// head of a matrix that is stored as its transpose, costs as much as the whole chunk, and the next head wants
// the same one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace regroup {

using ChunkBytes = std::shared_ptr<const std::vector<std::byte>>;

// Holds at most `budget` bytes; the least recently used chunk goes first. Not to be shared by threads.
class ChunkCache {
 public:
  static constexpr std::uint64_t kBudget = std::uint64_t{256} << 20;  // four of T5X's chunks

  explicit ChunkCache(std::uint64_t budget = kBudget) : budget_(budget) {}

  // The `size` bytes of the chunk `key`: those that are kept, or what `load` fills in, which are kept unless
  // they alone are more than the budget. Room is made before memory is taken. What `load` throws is passed
  // on, and nothing kept.
  ChunkBytes get(const std::string& key, std::uint64_t size,
                 const std::function<void(std::vector<std::byte>& bytes)>& load);

  std::uint64_t loads() const { return loads_; }  // how often get() called `load`
  std::uint64_t bytes() const { return bytes_; }  // that are held, with what keeping them costs

 private:
  struct Entry {
    std::string key;
    std::uint64_t cost = 0;
    ChunkBytes bytes;
  };

  std::uint64_t budget_, bytes_ = 0, loads_ = 0;
  std::list<Entry> entries_;  // the last used first
  std::map<std::string, std::list<Entry>::iterator> places_;
};

}  // namespace regroup
