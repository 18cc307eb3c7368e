// Attention by Hopper's warpgroup products is no worse than a naive implementation of the definition.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/flash_attention_wgmma.h"
#include "tests/kernels/attention_cases.h"
#include "tests/support/devices.h"

namespace regroup::test {
namespace {

class WgmmaAttentionTest : public testing::TestWithParam<AttentionCase> {};

TEST_P(WgmmaAttentionTest, IsNoWorseThanANaiveImplementation) {
  const std::vector<DeviceKind> devices = test_devices();
  if (std::find(devices.begin(), devices.end(), DeviceKind::kCuda) == devices.end()) GTEST_SKIP() << "no GPU";
  const auto backend = make_test_backend(DeviceKind::kCuda);
  CudaDevice& device = dynamic_cast<CudaBackend&>(*backend).device();
  if (device.compute_capability() != 90) GTEST_SKIP() << "needs compute capability 9.0";
  const AttentionCase& c = GetParam();
  OpCase op = attention_case(c);
  op.call = [&](Backend&, std::span<const Tensor> t) {
    wgmma_attention_forward(device, {t[0], t[1], t[2], t[3], t[4], t[5], t[6], c.options()});
  };
  Instance own(*backend, op, DType::kBFloat16);
  std::vector<Numbers> want = own.initial(), naive = want;
  own.call();
  NaiveAttention(c, exact).forward(want);
  NaiveAttention(c, to_bfloat16).forward(naive);
  expect_no_worse_than_naive(op, want, naive, own.numbers());
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
