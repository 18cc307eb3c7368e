// Which window of the corpus is sample number n of a run.
#pragma once

#include <cstdint>

namespace regroup {

// The global sample n = epoch * windows + i is window permutation(seed, epoch)(i): each epoch visits every
// window once, in an order of its own (Feistel, O(1) memory). A pure function; any thread may ask for any n.
class SampleOrder {
 public:
  // `windows` > 0.
  SampleOrder(std::uint64_t seed, std::int64_t windows);
  std::int64_t operator()(std::int64_t sample) const;
  std::int64_t windows() const { return windows_; }

 private:
  std::uint64_t seed_;
  std::int64_t windows_;
};

}  // namespace regroup
