#include "data/sample_order.h"

#include "kernels/base/error.h"
#include "kernels/base/random.h"

namespace regroup {

SampleOrder::SampleOrder(std::uint64_t seed, std::int64_t windows) : seed_(seed), windows_(windows) {
  check(windows > 0, "an order of {} windows was asked for", windows);
}

std::int64_t SampleOrder::operator()(std::int64_t sample) const {
  check(sample >= 0, "there is no sample {}", sample);
  const auto epoch = static_cast<std::uint64_t>(sample / windows_);
  const FeistelPermutation permutation(Philox(seed_, RandomPurpose::kSampleOrder, epoch),
                                       static_cast<std::uint64_t>(windows_));
  return static_cast<std::int64_t>(permutation(static_cast<std::uint64_t>(sample % windows_)));
}

}  // namespace regroup
