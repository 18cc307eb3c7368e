// Grouped-query attention on every device: parity with loops over the definition, gradients, the same bits in
// every run, bfloat16 no worse than a naive implementation.
#include "tests/kernels/attention_cases.h"
#include "tests/support/devices.h"
#include "tests/support/gradient_check.h"

namespace regroup::test {
namespace {

std::vector<AttentionCase> all_cases() {
  std::vector<AttentionCase> all = attention_combinations(19, 23, 12);
  for (const AttentionCase& c : attention_shapes()) all.push_back(c);
  return all;
}

using AttentionOnDevice = std::tuple<DeviceKind, AttentionCase>;
std::string name_of_test(const testing::TestParamInfo<AttentionOnDevice>& instance) {
  return test_name(std::get<DeviceKind>(instance.param), std::get<AttentionCase>(instance.param).name());
}
auto on_every_device(const std::vector<AttentionCase>& cases) {
  return testing::Combine(testing::ValuesIn(test_devices()), testing::ValuesIn(cases));
}

class AttentionTest : public testing::TestWithParam<AttentionOnDevice> {};

TEST_P(AttentionTest, AgreesWithTheDefinition) {
  const auto& [device, c] = GetParam();
  const auto backend = make_test_backend(device);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32}) {
    expect_parity(*backend, attention_case(c), dtype);
    expect_parity(*backend, attention_backward_case(c), dtype);
  }
}

TEST_P(AttentionTest, SameBitsInEveryRun) {
  const auto& [device, c] = GetParam();
  const auto backends = backends_of_equal_bits(device);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const OpCase& op : {attention_case(c), attention_backward_case(c)}) {
      expect_same_bits(backends, op, dtype);
    }
  }
}

TEST_P(AttentionTest, BFloat16IsNoWorseThanANaiveImplementation) {
  const auto& [device, c] = GetParam();
  const auto backend = make_test_backend(device);
  const NaiveAttention exactly(c, exact), naively(c, to_bfloat16);
  const OpCase forward_op = attention_case(c), backward_op = attention_backward_case(c);
  Instance forward(*backend, forward_op, DType::kBFloat16), backward(*backend, backward_op, DType::kBFloat16);
  std::vector<Numbers> want = forward.initial(), naive = want;
  forward.call();
  exactly.forward(want);
  naively.forward(naive);
  expect_no_worse_than_naive(forward_op, want, naive, forward.numbers());

  // Each implementation's gradients from its own out and log_sum_exp.
  std::vector<Numbers> dwant = backward.initial(), dnaive = dwant;
  for (const std::size_t i : {5, 6}) {
    backward.set(i + 1, forward.numbers()[i]);
    dwant[i + 1] = want[i];
    dnaive[i + 1] = naive[i];
  }
  backward.call();
  exactly.backward(dwant);
  naively.backward(dnaive);
  expect_no_worse_than_naive(backward_op, dwant, dnaive, backward.numbers());
}

INSTANTIATE_TEST_SUITE_P(Cases, AttentionTest, on_every_device(all_cases()), name_of_test);

class AttentionGradientTest : public testing::TestWithParam<AttentionOnDevice> {};

TEST_P(AttentionGradientTest, AgreesWithCentralDifferences) {
  const auto& [device, c] = GetParam();
  expect_gradients(*make_test_backend(device, 1), attention_case(c), attention_backward_case(c));
}

std::vector<AttentionCase> gradient_cases() {
  std::vector<AttentionCase> all = attention_combinations(5, 7, 3);
  AttentionCase dropped = all.back();
  dropped.dropout = 0.1;
  all.push_back(dropped);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Cases, AttentionGradientTest, on_every_device(gradient_cases()), name_of_test);

class BlindAttentionTest : public testing::TestWithParam<DeviceKind> {};

// A query that sees no key: out 0, log_sum_exp +inf, gradients 0, also where memory held NaN before.
TEST_P(BlindAttentionTest, GivesZeros) {
  const auto backend = make_test_backend(GetParam());
  const AttentionCase c{.queries = 70,
                        .keys = 40,
                        .heads = 2,
                        .groups = 1,
                        .size = 64,
                        .bias = true,
                        .mask = Mask::kBlindSample};
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    Instance forward(*backend, attention_case(c), dtype),
        backward(*backend, attention_backward_case(c), dtype);
    forward.call();
    const std::vector<Numbers> results = forward.numbers();
    backward.set(6, results[5]);
    backward.set(7, results[6]);
    backward.call();
    const std::vector<Numbers> gradients = backward.numbers();
    for (const Numbers& x : {results[5], gradients[8], gradients[9], gradients[10]}) {
      for (std::size_t n = 0; n < x.size() / 2; ++n) ASSERT_EQ(x[n], 0) << "at " << n;
    }
    for (std::size_t n = 0; n < results[6].size() / 2; ++n) {
      ASSERT_EQ(results[6][n], std::numeric_limits<double>::infinity());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, BlindAttentionTest, testing::ValuesIn(test_devices()),
                         [](const auto& instance) { return name_of(instance.param); });

}  // namespace
}  // namespace regroup::test
