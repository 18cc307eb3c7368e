// Every op on every device: parity with a naive reference in three types, gradients, the same bits in every
// run and with any number of threads.
#include "tests/kernels/activation_cases.h"
#include "tests/kernels/cross_entropy_cases.h"
#include "tests/kernels/embedding_cases.h"
#include "tests/kernels/memory_cases.h"
#include "tests/kernels/norm_cases.h"
#include "tests/kernels/optimizer_cases.h"
#include "tests/support/devices.h"
#include "tests/support/gradient_check.h"

namespace regroup::test {
namespace {

std::vector<OpCase> all_cases() {
  std::vector<OpCase> all;
  for (const auto& part : {memory_cases(), norm_cases(), activation_cases(), embedding_cases(),
                           cross_entropy_cases(), optimizer_cases()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

std::vector<std::pair<OpCase, OpCase>> all_gradients() {
  std::vector<std::pair<OpCase, OpCase>> all;
  for (const auto& part :
       {norm_gradients(), activation_gradients(), embedding_gradients(), cross_entropy_gradients()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

using OpOnDevice = std::tuple<DeviceKind, OpCase>;
class OpCaseTest : public testing::TestWithParam<OpOnDevice> {};

TEST_P(OpCaseTest, AgreesWithTheReference) {
  const auto& [device, op] = GetParam();
  const auto backend = make_test_backend(device);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    expect_parity(*backend, op, dtype);
  }
}

TEST_P(OpCaseTest, SameBitsInEveryRun) {
  const auto& [device, op] = GetParam();
  const auto backends = backends_of_equal_bits(device);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    for (const auto& other : backends) expect_same_bits(*backends[0], *other, op, dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Ops, OpCaseTest,
                         testing::Combine(testing::ValuesIn(test_devices()), testing::ValuesIn(all_cases())),
                         [](const auto& instance) {
                           return test_name(std::get<0>(instance.param), std::get<1>(instance.param).name);
                         });

using GradientOnDevice = std::tuple<DeviceKind, std::pair<OpCase, OpCase>>;
class GradientTest : public testing::TestWithParam<GradientOnDevice> {};

TEST_P(GradientTest, AgreesWithCentralDifferences) {
  const auto& [device, ops] = GetParam();
  expect_gradients(*make_test_backend(device, 1), ops.first, ops.second);
}

INSTANTIATE_TEST_SUITE_P(Ops, GradientTest,
                         testing::Combine(testing::ValuesIn(test_devices()),
                                          testing::ValuesIn(all_gradients())),
                         [](const auto& instance) {
                           return test_name(std::get<0>(instance.param),
                                            std::get<1>(instance.param).second.name);
                         });

TEST(Devices, Gpu) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU: ops are tested on the CPU and in emulation only";
  EXPECT_FALSE(make_test_backend(DeviceKind::kCuda)->describe().empty());
}

}  // namespace
}  // namespace regroup::test
