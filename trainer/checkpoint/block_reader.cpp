#include "trainer/checkpoint/block_reader.h"

#include <utility>

namespace regroup {
namespace {

constexpr int kThreads = 2;  // one reads while the other takes a checksum

}  // namespace

BlockReader::BlockReader(const std::filesystem::path& directory, const FilePlan& files,
                         std::vector<std::vector<Block>> rounds, Backend& backend, const Options& options)
    : rounds_(std::move(rounds)), options_(options), done_(rounds_.size()) {
  for (const PlannedFile& file : files.files) files_.emplace_back(directory / file.name, options.caching);
  for (std::size_t round = 0; round < rounds_.size(); ++round) {
    for (std::size_t i = 0; i < rounds_[round].size(); ++i) tasks_.push_back({.round = round, .index = i});
  }
  checksums_.resize(tasks_.size());
  memory_ = BlockMemory(backend, memory_of(options.block_bytes, options.slots), options.memory);
  for (int i = 0; i < kThreads; ++i) {
    threads_.emplace_back([this](const std::stop_token& stop) { work(stop); });
  }
}

void BlockReader::work(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  const auto may_go_on = [this] {
    const std::size_t in_use = given_ == 0 ? 0 : given_ - 1;
    return begun_ == tasks_.size() || tasks_[begun_].round < in_use + kRoundsInMemory;
  };
  while (changed_.wait(lock, stop, may_go_on) && begun_ < tasks_.size() && !stop.stop_requested()) {
    const Task task = tasks_[begun_++];
    const bool reads = failure_ == nullptr;
    lock.unlock();
    std::exception_ptr failure;
    try {
      if (reads) read(task);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure_ == nullptr) failure_ = failure;
    ++done_[task.round];
    changed_.notify_all();
  }
}

void BlockReader::read(const Task& task) {
  const Block& block = rounds_[task.round][task.index];
  const std::span bytes(place_of(task.round) + task.index * options_.block_bytes,
                        static_cast<std::size_t>(block.bytes));
  files_[block.file].read(block.begin, bytes);
  checksums_[block.slot] = checksum(bytes);
}

const std::byte* BlockReader::next(const std::function<void()>& progress) {
  std::unique_lock lock(mutex_);
  const std::size_t round = given_++;
  changed_.notify_all();
  while (done_[round] < rounds_[round].size()) {
    changed_.wait(lock);
    progress();
  }
  return place_of(round);
}

void BlockReader::rethrow() const {
  if (failure_ != nullptr) std::rethrow_exception(failure_);
}

}  // namespace regroup
