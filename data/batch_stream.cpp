#include "data/batch_stream.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "data/tokenizer.h"
#include "kernels/base/error.h"

namespace regroup {
namespace {

std::int64_t windows_of(const Corpus& corpus, Split split, std::int64_t window) {
  const std::int64_t tokens = corpus.tokens(split);
  if (tokens < window) {
    throw UserError(
        "the {} split of the corpus {} has {} tokens, fewer than one window of {}; prepare more text, or a "
        "larger held-out fraction",
        name_of(split), corpus.folder().string(), tokens, window);
  }
  return tokens / window;
}

}  // namespace

Samples::Samples(const Corpus& corpus, Split split, const SampleOptions& options)
    : corpus_(&corpus),
      split_(split),
      options_(options),
      lengths_(random_spans_lengths(options.corruption)),
      order_(options.seed, windows_of(corpus, split, lengths_.window)) {}

std::vector<std::int32_t> Samples::window(std::int64_t n) const {
  const std::int64_t index = options_.shuffle ? order_(n) : n % windows();
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(lengths_.window));
  corpus_->read(split_, index * lengths_.window, tokens);
  return tokens;
}

Sample Samples::operator()(std::int64_t n) const {
  const auto tokens = window(n);
  const Philox philox(options_.seed, RandomPurpose::kSpanMask, static_cast<std::uint64_t>(n));
  const auto mask = random_spans_noise_mask(lengths_.window, options_.corruption, philox);
  return corrupt(tokens, mask, corpus_->manifest().first_sentinel(), options_.corruption.inputs_length,
                 lengths_.targets);
}

void make_batch(const Samples& samples, const BatchRequest& request, Batch& batch) {
  check(request.first_sample >= 0 && request.count >= 0, "a batch of {} samples from {} was asked for",
        request.count, request.first_sample);
  batch.first_sample = request.first_sample;
  batch.size = request.count;
  batch.inputs_length = samples.inputs_length();
  batch.targets_length = samples.lengths().targets;
  batch.input_ids.assign(static_cast<std::size_t>(batch.size * batch.inputs_length), Tokenizer::kPad);
  batch.targets.assign(static_cast<std::size_t>(batch.size * batch.targets_length), Tokenizer::kPad);
  for (std::int64_t i = 0; i < batch.size; ++i) {
    const Sample sample = samples(request.first_sample + i);
    std::copy(sample.inputs.begin(), sample.inputs.end(), batch.input_ids.begin() + i * batch.inputs_length);
    std::copy(sample.targets.begin(), sample.targets.end(), batch.targets.begin() + i * batch.targets_length);
  }
}

BatchStream::BatchStream(Samples samples, Schedule schedule, const PrefetchOptions& options)
    : samples_(samples), schedule_(std::move(schedule)) {
  check(options.workers >= 1 && options.depth >= 2, "a stream with {} workers and {} batches was asked for",
        options.workers, options.depth);
  slots_.resize(static_cast<std::size_t>(options.depth));
  for (int i = 0; i < options.workers; ++i) {
    workers_.emplace_back([this](const std::stop_token& stop) { work(stop); });
  }
}

void BatchStream::work(const std::stop_token& stop) {
  const auto depth = static_cast<std::int64_t>(slots_.size());
  std::unique_lock lock(mutex_);
  for (;;) {
    if (!freed_.wait(lock, stop, [&] { return end_ || claimed_ < released_ + depth; }) || end_) return;
    const std::int64_t number = claimed_++;
    Slot& slot = slots_[static_cast<std::size_t>(number % depth)];
    std::exception_ptr error;
    try {
      const auto request = schedule_(number);
      if (!request) {
        end_ = number;
        made_.notify_all();
        freed_.notify_all();
        return;
      }
      lock.unlock();
      make_batch(samples_, *request, slot.batch);
    } catch (...) {
      error = std::current_exception();
    }
    if (!lock.owns_lock()) lock.lock();
    slot.error = error;
    slot.ready = number;
    made_.notify_all();
  }
}

const Batch* BatchStream::next() {
  std::unique_lock lock(mutex_);
  released_ = next_;
  freed_.notify_all();
  Slot& slot = slots_[static_cast<std::size_t>(next_) % slots_.size()];
  const auto made = [&] { return slot.ready == next_ || (end_ && *end_ <= next_); };
  if (!made()) {
    const auto start = std::chrono::steady_clock::now();
    made_.wait(lock, made);
    wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (slot.ready != next_) return nullptr;
  if (slot.error) std::rethrow_exception(slot.error);
  ++next_;
  return &slot.batch;
}

}  // namespace regroup
