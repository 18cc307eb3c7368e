// Matrix products on the CPU: every transposition, strides, accumulation and type against a naive product.
#include "kernels/cpu/cpu_backend.h"
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

class MatmulTest : public testing::TestWithParam<Product> {};

TEST_P(MatmulTest, AgreesWithANaiveProduct) {
  for (const int threads : {1, 2}) {
    CpuBackend backend(threads);
    for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
      expect_parity(backend, matmul_case(GetParam()), dtype);
    }
  }
}

TEST_P(MatmulTest, SameBitsAtEveryCall) {
  CpuBackend backend(2), other(2);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    expect_same_bits(backend, backend, matmul_case(GetParam()), dtype);
    expect_same_bits(backend, other, matmul_case(GetParam()), dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Products, MatmulTest, testing::ValuesIn(products()),
                         [](const auto& instance) { return instance.param.name(); });

// One backend, many shapes: each keeps its own primitive, all share the scratchpad.
TEST(Matmul, ShapesMayAlternate) {
  CpuBackend backend(2);
  for (int round = 0; round < 2; ++round) {
    for (const index_t m : {5, 200, 64}) {
      expect_parity(backend, matmul_case({.m = m, .n = 40, .k = 3 * m, .options = {.transpose_b = true}}),
                    DType::kBFloat16);
    }
  }
}

TEST(Matmul, EmptyContraction) {
  CpuBackend backend(1);
  std::vector<float> c = {1, 2, 3, 4, 5, 6};
  float nothing = 0;
  const Tensor a(&nothing, DType::kFloat32, {2, 0}), b(&nothing, DType::kFloat32, {0, 3});
  const Tensor result(c.data(), DType::kFloat32, {2, 3});
  backend.matmul(a, b, result, {.accumulate = true});
  EXPECT_EQ(c, (std::vector<float>{1, 2, 3, 4, 5, 6}));
  backend.matmul(a, b, result, {});
  EXPECT_EQ(c, std::vector<float>(6, 0.0F));
}

}  // namespace
}  // namespace regroup::test
