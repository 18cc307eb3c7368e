// Training samples and batches as pure functions of (corpus, seed, global sample number), made ahead of need.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "data/corpus.h"
#include "data/sample_order.h"
#include "data/span_corruption.h"

namespace regroup {

struct SampleOptions {
  SpanCorruption corruption = {};
  std::uint64_t seed = 0;  // of the order and of the masks
  // In the order of SampleOrder (training), or window n of the split as sample n (evaluation).
  bool shuffle = true;
};

// The samples of a split. The split's tokens are cut into windows of lengths().window (the tail is left out);
// sample n is window order(n), corrupted by the mask drawn for (seed, n). Every call is a pure function; a
// Samples may be used by several threads at once. The corpus must outlive it.
class Samples {
 public:
  // Throws UserError where the lengths are impossible (see random_spans_lengths()) or the split has no
  // window.
  Samples(const Corpus& corpus, Split split, const SampleOptions& options);

  std::int64_t windows() const { return order_.windows(); }  // samples of one epoch
  std::int64_t inputs_length() const { return options_.corruption.inputs_length; }
  const SpanLengths& lengths() const { return lengths_; }

  // Sample number `n` >= 0, without padding. Past the last window a new epoch starts, with new masks.
  Sample operator()(std::int64_t n) const;
  // The raw tokens of sample number `n`.
  std::vector<std::int32_t> window(std::int64_t n) const;

 private:
  const Corpus* corpus_;
  Split split_;
  SampleOptions options_;
  SpanLengths lengths_;
  SampleOrder order_;
};

// The global samples [first_sample, first_sample + count).
struct BatchRequest {
  std::int64_t first_sample = 0;
  std::int64_t count = 0;
};

struct Batch {
  std::int64_t first_sample = 0;
  std::int64_t size = 0;                // B
  std::int64_t inputs_length = 0;       // S
  std::int64_t targets_length = 0;      // T
  std::vector<std::int32_t> input_ids;  // [B, S], padded with 0
  std::vector<std::int32_t> targets;    // [B, T], padded with 0
};

// Fills `batch` with the samples asked for; reuses its memory.
void make_batch(const Samples& samples, const BatchRequest& request, Batch& batch);

struct PrefetchOptions {
  int workers = 1;
  int depth = 4;  // batches in memory, the one in use included; at least 2
};

// Batches in the order of a schedule, made by a few threads while earlier ones are in use. What next()
// returns does not depend on the number of workers. Used by one thread; the destructor stops and joins the
// workers.
class BatchStream {
 public:
  // The request for batch number 0, 1, ..., or nothing where the stream ends. Called by the workers, one call
  // at a time, in order.
  using Schedule = std::function<std::optional<BatchRequest>(std::int64_t batch)>;

  BatchStream(Samples samples, Schedule schedule, const PrefetchOptions& options = {});
  ~BatchStream() = default;
  BatchStream(const BatchStream&) = delete;
  BatchStream& operator=(const BatchStream&) = delete;

  // The next batch, valid until the following call; null at the end. Rethrows what a worker threw over it.
  const Batch* next();
  // Seconds that next() has waited for workers since the start: the "data wait" of a run.
  double wait_seconds() const { return wait_seconds_; }

 private:
  struct Slot {
    Batch batch;
    std::int64_t ready = -1;  // number of the batch that is in it
    std::exception_ptr error;
  };

  void work(const std::stop_token& stop);

  const Samples samples_;
  const Schedule schedule_;
  std::vector<Slot> slots_;  // batch b goes through slot b % depth

  std::mutex mutex_;  // guards all below and Slot::ready, Slot::error
  std::condition_variable_any made_;
  std::condition_variable_any freed_;
  std::int64_t claimed_ = 0;   // batches that workers have taken on
  std::int64_t released_ = 0;  // batches that the consumer is done with
  std::optional<std::int64_t> end_;

  std::int64_t next_ = 0;  // the consumer's
  double wait_seconds_ = 0;
  std::vector<std::jthread> workers_;  // last: joined before anything they use goes
};

}  // namespace regroup
