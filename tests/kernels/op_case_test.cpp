// Every op: parity with a naive reference in three types, gradients, the same bits with any number of
// threads.
#include <cctype>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/plan_backend.h"
#include "tests/kernels/activation_cases.h"
#include "tests/kernels/cross_entropy_cases.h"
#include "tests/kernels/embedding_cases.h"
#include "tests/kernels/memory_cases.h"
#include "tests/kernels/norm_cases.h"
#include "tests/kernels/optimizer_cases.h"
#include "tests/support/gradient_check.h"

namespace regroup::test {
namespace {

std::string test_name(std::string name) {
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

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

class OpCaseTest : public testing::TestWithParam<OpCase> {};

TEST_P(OpCaseTest, AgreesWithTheReference) {
  CpuBackend backend(2);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    expect_parity(backend, GetParam(), dtype);
  }
}

TEST_P(OpCaseTest, SameBitsWithAnyNumberOfThreads) {
  CpuBackend one(1), two(2), five(5);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    expect_same_bits(one, two, GetParam(), dtype);
    expect_same_bits(one, five, GetParam(), dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Ops, OpCaseTest, testing::ValuesIn(all_cases()),
                         [](const auto& instance) { return test_name(instance.param.name); });

class GradientTest : public testing::TestWithParam<std::pair<OpCase, OpCase>> {};

TEST_P(GradientTest, AgreesWithCentralDifferences) {
  CpuBackend backend(1);
  expect_gradients(backend, GetParam().first, GetParam().second);
}

INSTANTIATE_TEST_SUITE_P(Ops, GradientTest, testing::ValuesIn(all_gradients()),
                         [](const auto& instance) { return test_name(instance.param.second.name); });

}  // namespace
}  // namespace regroup::test
