// Attention by Hopper's warpgroup products agrees with the kernels for every GPU, which the op tests hold to
// the definition.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/flash_attention_wgmma.h"
#include "tests/kernels/attention_cases.h"
#include "tests/support/devices.h"

namespace regroup::test {
namespace {

using Forward = void (*)(CudaDevice&, const AttentionCall&);

OpCase case_by(Forward forward, const AttentionCase& c) {
  OpCase op = attention_case(c);
  op.call = [forward, c](Backend& backend, std::span<const Tensor> t) {
    forward(dynamic_cast<CudaBackend&>(backend).device(),
            {t[0], t[1], t[2], t[3], t[4], t[5], t[6], c.options()});
  };
  return op;
}

// Both round at the same places, but their sums may have other orders.
void expect_near(const Numbers& own, const Numbers& other, double tolerance) {
  ASSERT_EQ(own.size(), other.size());
  for (std::size_t i = 0; i < own.size(); ++i) {
    if (std::isinf(other[i])) {
      ASSERT_EQ(own[i], other[i]) << "at " << i;
    } else {
      ASSERT_LE(std::abs(own[i] - other[i]), tolerance) << "at " << i;
    }
  }
}

class WgmmaAttentionTest : public testing::TestWithParam<AttentionCase> {};

TEST_P(WgmmaAttentionTest, AgreesWithTheKernelsForEveryGpu) {
  const std::vector<DeviceKind> devices = test_devices();
  if (std::find(devices.begin(), devices.end(), DeviceKind::kCuda) == devices.end()) GTEST_SKIP() << "no GPU";
  const auto backend = make_test_backend(DeviceKind::kCuda);
  CudaDevice& device = dynamic_cast<CudaBackend&>(*backend).device();
  if (device.compute_capability() != 90) GTEST_SKIP() << "needs compute capability 9.0";
  Instance own(*backend, case_by(wgmma_attention_forward, GetParam()), DType::kBFloat16),
      other(*backend, case_by(flash_attention_forward, GetParam()), DType::kBFloat16);
  own.call();
  other.call();
  const std::vector<Numbers> x = own.numbers(), y = other.numbers();
  const AttentionCase& c = GetParam();
  expect_near(x[5], y[5], 2 * unit_roundoff(DType::kBFloat16) * largest(y[5]));
  expect_near(x[6], y[6],
              (kElementwiseOperations + static_cast<double>(c.keys + c.size)) *
                  unit_roundoff(DType::kFloat32) * static_cast<double>(c.size));
}

std::vector<AttentionCase> cases() {
  std::vector<AttentionCase> all = attention_combinations(19, 80, 64);
  for (const AttentionCase& c : attention_shapes()) {
    if (c.size % 8 == 0 && c.padding % 8 == 0) all.push_back(c);
  }
  for (const index_t size : {64, 128}) {
    for (const double dropout : {0.0, 0.1}) {
      all.push_back({.queries = 150,
                     .keys = 260,
                     .heads = 2,
                     .groups = 1,
                     .size = size,
                     .bias = dropout == 0,
                     .mask = Mask::kScattered,
                     .dropout = dropout});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Cases, WgmmaAttentionTest, testing::ValuesIn(cases()),
                         [](const auto& instance) { return instance.param.name(); });

}  // namespace
}  // namespace regroup::test
