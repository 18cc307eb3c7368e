// Reads a rank's blocks ahead of their use.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/checkpoint/block_exchange.h"

namespace regroup {

// Reads rounds of blocks, with their checksums, on threads that call no MPI: the next round while one is in
// use. An error of reading is kept for rethrow(): the rounds go on, as those of other ranks do.
class BlockReader {
 public:
  static constexpr std::size_t kRoundsInMemory = 2;

  struct Options {
    std::uint64_t block_bytes = 0;
    std::size_t slots = 1;  // blocks of a round, at most
    Caching caching = Caching::kThrough;
    std::span<std::byte> memory = {};  // that may be used while the reader lives
  };
  // `rounds`: by round, this rank's blocks of it; their slots count on from round to round. Begins to read.
  // Errors as InputFile.
  BlockReader(const std::filesystem::path& directory, const FilePlan& files,
              std::vector<std::vector<Block>> rounds, Backend& backend, const Options& options);
  BlockReader(const BlockReader&) = delete;
  BlockReader& operator=(const BlockReader&) = delete;

  // Bytes of memory that it needs.
  static std::uint64_t memory_of(std::uint64_t block_bytes, std::size_t slots) {
    return kRoundsInMemory * slots * block_bytes;
  }

  // Waits for a round, which is the one after the last; `progress` is called as its blocks come. They lie
  // block_bytes apart until the next call.
  const std::byte* next(const std::function<void()>& progress);
  // After the last round: throws what reading threw.
  void rethrow() const;
  // After the last round: XXH3 of every block, by slot.
  const std::vector<std::uint64_t>& checksums() const { return checksums_; }

 private:
  struct Task {
    std::size_t round = 0, index = 0;  // rounds_[round][index]
  };

  void work(const std::stop_token& stop);
  void read(const Task& task);
  std::byte* place_of(std::size_t round) const {
    return memory_.data() + round % kRoundsInMemory * options_.slots * options_.block_bytes;
  }

  std::vector<InputFile> files_;
  std::vector<std::vector<Block>> rounds_;
  std::vector<Task> tasks_;  // all blocks, in order
  Options options_;
  BlockMemory memory_;
  std::vector<std::uint64_t> checksums_;

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::size_t begun_ = 0;          // tasks
  std::size_t given_ = 0;          // rounds that next() gave out
  std::vector<std::size_t> done_;  // tasks, by round
  std::exception_ptr failure_;
  std::vector<std::jthread> threads_;  // last: they use the others, until they are told to stop
};

}  // namespace regroup
