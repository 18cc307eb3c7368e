// Matrix products on every device: every transposition, strides, accumulation and type against a naive
// product.
#include "tests/support/devices.h"
#include "tests/support/op_case.h"

namespace regroup::test {
namespace {

struct Product {
  index_t m, n, k;
  MatmulOptions options;
  index_t padding = 0;                 // between rows, of all three
  Element result = Element::kCompute;  // of c

  std::string name() const {
    return fmt::format("M{}_N{}_K{}{}{}{}{}{}", m, n, k, options.transpose_a ? "_ta" : "",
                       options.transpose_b ? "_tb" : "", options.accumulate ? "_add" : "",
                       padding > 0 ? "_strided" : "", result == Element::kStatistic ? "_statistic" : "");
  }
};

OpCase matmul_case(const Product& p) {
  OpCase op;
  op.name = "matmul/" + p.name();
  op.arguments = {{.name = "a",
                   .shape = p.options.transpose_a ? std::vector{p.k, p.m} : std::vector{p.m, p.k},
                   .padding = p.padding},
                  {.name = "b",
                   .shape = p.options.transpose_b ? std::vector{p.n, p.k} : std::vector{p.k, p.n},
                   .padding = p.padding},
                  {.name = "c",
                   .role = p.options.accumulate ? Role::kAccumulated : Role::kOutput,
                   .element = p.result,
                   .shape = {p.m, p.n},
                   .padding = p.padding,
                   .reduction = static_cast<double>(p.k + 1),
                   .magnitude = static_cast<double>(p.k)}};  // at least: |a| |b| of normal numbers
  op.call = [p](Backend& backend, std::span<const Tensor> t) { backend.matmul(t[0], t[1], t[2], p.options); };
  op.reference = [p](std::vector<Numbers>& v) {
    for (index_t i = 0; i < p.m; ++i) {
      for (index_t j = 0; j < p.n; ++j) {
        double& c = v[2][static_cast<std::size_t>(i * p.n + j)];
        if (!p.options.accumulate) c = 0;
        for (index_t k = 0; k < p.k; ++k) {
          const index_t a = p.options.transpose_a ? k * p.m + i : i * p.k + k;
          const index_t b = p.options.transpose_b ? j * p.k + k : k * p.n + j;
          c += v[0][static_cast<std::size_t>(a)] * v[1][static_cast<std::size_t>(b)];
        }
      }
    }
  };
  return op;
}

std::vector<Product> products() {
  std::vector<Product> all;
  for (const bool a : {false, true}) {
    for (const bool b : {false, true}) {
      for (const bool add : {false, true}) {
        for (const Element result : {Element::kCompute, Element::kStatistic}) {
          const MatmulOptions options{.transpose_a = a, .transpose_b = b, .accumulate = add};
          all.push_back({.m = 37, .n = 50, .k = 70, .options = options, .result = result});
          all.push_back({.m = 16, .n = 33, .k = 24, .options = options, .padding = 8, .result = result});
        }
      }
    }
  }
  all.push_back({.m = 1, .n = 1, .k = 1, .options = {}});
  all.push_back({.m = 1, .n = 300, .k = 129, .options = {.transpose_b = true}});
  all.push_back({.m = 257, .n = 129, .k = 513, .options = {.transpose_b = true}});
  return all;
}

class MatmulTest : public testing::TestWithParam<std::tuple<DeviceKind, Product>> {};

TEST_P(MatmulTest, AgreesWithANaiveProduct) {
  const auto& [device, product] = GetParam();
  for (const int threads : {1, 2}) {
    const auto backend = make_test_backend(device, threads);
    for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
      expect_parity(*backend, matmul_case(product), dtype);
    }
  }
}

TEST_P(MatmulTest, SameBitsAtEveryCall) {
  const auto& [device, product] = GetParam();
  const auto backend = make_test_backend(device), other = make_test_backend(device);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    Backend* const calls[] = {backend.get(), backend.get(), other.get()};
    expect_same_bits(calls, matmul_case(product), dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Products, MatmulTest,
                         testing::Combine(testing::ValuesIn(test_devices()), testing::ValuesIn(products())),
                         [](const auto& instance) {
                           return test_name(std::get<0>(instance.param), std::get<1>(instance.param).name());
                         });

class MatmulsTest : public testing::TestWithParam<DeviceKind> {};

// One backend, many shapes: each keeps its own primitive, all share the scratchpad.
TEST_P(MatmulsTest, ShapesMayAlternate) {
  const auto backend = make_test_backend(GetParam());
  for (int round = 0; round < 2; ++round) {
    for (const index_t m : {5, 200, 64}) {
      expect_parity(*backend, matmul_case({.m = m, .n = 40, .k = 3 * m, .options = {.transpose_b = true}}),
                    DType::kBFloat16);
    }
  }
}

TEST_P(MatmulsTest, EmptyContraction) {
  const auto backend = make_test_backend(GetParam());
  const std::vector<float> before = {1, 2, 3, 4, 5, 6};
  std::vector<float> after(6);
  const Buffer memory = backend->allocate(6 * sizeof(float)), nothing = backend->allocate(1);
  const Tensor a(nothing.data(), DType::kFloat32, {2, 0}), b(nothing.data(), DType::kFloat32, {0, 3});
  const Tensor c = memory.tensor(DType::kFloat32, {2, 3});
  backend->copy_from_host(before.data(), c);
  backend->matmul(a, b, c, {.accumulate = true});
  backend->copy_to_host(c, after.data());
  EXPECT_EQ(after, before);
  backend->matmul(a, b, c, {});
  backend->copy_to_host(c, after.data());
  EXPECT_EQ(after, std::vector<float>(6, 0.0F));
}

INSTANTIATE_TEST_SUITE_P(Devices, MatmulsTest, testing::ValuesIn(test_devices()),
                         [](const auto& instance) { return name_of(instance.param); });

}  // namespace
}  // namespace regroup::test
