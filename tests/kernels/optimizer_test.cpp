// Adafactor: golden values of t5x/adafactor_test.py, slices of a matrix, degenerate gradients.
#include <array>

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/optimizer_cases.h"

namespace regroup::test {
namespace {

constexpr double kBeta2AtStep1 = 0.42565082250148245;  // 1 - 2^-0.8
constexpr AdafactorOptions kGoldenOptions{.beta2 = kBeta2AtStep1, .learning_rate = 0.1};

// One Adafactor slot of a [rows, columns] matrix in float64, factored, on the host.
struct HostSlot {
  HostSlot(index_t rows, index_t columns, double w, double g)
      : weight(static_cast<std::size_t>(rows * columns), w),
        gradient(weight.size(), g),
        row(static_cast<std::size_t>(rows)),
        column(static_cast<std::size_t>(columns)),
        row_sums(row.size()),
        column_sums(column.size()),
        rows_(rows),
        columns_(columns) {}

  AdafactorSlot slot() {
    const DType f = DType::kFloat64;
    return {.weight = Tensor(weight.data(), f, {rows_, columns_}),
            .gradient = Tensor(gradient.data(), f, {rows_, columns_}),
            .row = Tensor(row.data(), f, {rows_}),
            .column = Tensor(column.data(), f, {columns_}),
            .row_sums = Tensor(row_sums.data(), f, {rows_}),
            .column_sums = Tensor(column_sums.data(), f, {columns_}),
            .totals = Tensor(totals.data(), f, {4}),
            .global_rows = rows_,
            .global_columns = columns_};
  }

  std::vector<double> weight, gradient, row, column, row_sums, column_sums;
  std::array<double, 4> totals{};

 private:
  index_t rows_, columns_;
};

// T5X: params ones(3, 2), gradient ones, v_row .9, v_col .1, step 1, lr .1. Its v_row belongs to the smaller
// dimension, here the rows: the matrix is transposed. (The update divides by the mean of v_row. Moments that
// come from gradients have the same mean in rows and columns; these have not.)
TEST(Adafactor, FactoredGoldenValues) {
  CpuBackend backend(1);
  HostSlot host(2, 3, 1, 1);
  host.row.assign(2, 0.9);
  host.column.assign(3, 0.1);
  adafactor_pass(backend, host.slot(), kGoldenOptions);
  for (const double v : host.row) EXPECT_NEAR(v, 0.9574349, 5e-8);
  for (const double v : host.column) EXPECT_NEAR(v, 0.6169143, 5e-8);
  for (const double w : host.weight) EXPECT_NEAR(w, 0.9, 1e-12);
}

// The same with the gradient clipped to a global norm of 1: each element becomes 1 / sqrt(6).
TEST(Adafactor, FactoredGoldenValuesOfAClippedGradient) {
  CpuBackend backend(1);
  HostSlot host(2, 3, 1, 1 / std::sqrt(6.0));
  host.row.assign(2, 0.9);
  host.column.assign(3, 0.1);
  adafactor_pass(backend, host.slot(), kGoldenOptions);
  for (const double v : host.row) EXPECT_NEAR(v, 0.478811, 5e-7);
  for (const double v : host.column) EXPECT_NEAR(v, 0.13829, 5e-6);
  for (const double w : host.weight) EXPECT_NEAR(w, 0.9, 1e-12);
}

TEST(Adafactor, FullGoldenValues) {
  CpuBackend backend(1);
  HostSlot host(3, 2, 1, 1);
  std::vector<double> second_moment(6, 0.5);
  AdafactorSlot slot = host.slot();
  slot.row = slot.column = slot.row_sums = slot.column_sums = Tensor();
  slot.second_moment = Tensor(second_moment.data(), DType::kFloat64, {3, 2});
  adafactor_pass(backend, slot, kGoldenOptions);
  for (const double v : second_moment) EXPECT_NEAR(v, 0.787174, 1e-6);
  for (const double w : host.weight) EXPECT_NEAR(w, 0.9, 1e-12);
}

// A matrix in two slices of columns, or of rows, whose totals and shared sums are added up between the
// passes, is updated as the whole is.
TEST(Adafactor, SlicesAddUpToTheWhole) {
  constexpr index_t kRows = 12, kColumns = 10;
  const Philox random(6, RandomPurpose::kTest);
  CpuBackend backend(1);
  for (const bool by_columns : {true, false}) {
    HostSlot whole(kRows, kColumns, 0, 0);
    const index_t rows = by_columns ? kRows : kRows / 2, columns = by_columns ? kColumns / 2 : kColumns;
    std::vector<HostSlot> parts(2, HostSlot(rows, columns, 0, 0));
    for (index_t i = 0; i < kRows * kColumns; ++i) {
      const index_t r = i / kColumns, c = i % kColumns;
      HostSlot& part = parts[static_cast<std::size_t>(by_columns ? c / columns : r / rows)];
      const auto at = static_cast<std::size_t>(r % rows * columns + c % columns);
      whole.weight[static_cast<std::size_t>(i)] = part.weight[at] =
          random.normal(static_cast<std::uint64_t>(i));
      whole.gradient[static_cast<std::size_t>(i)] = part.gradient[at] =
          random.normal(static_cast<std::uint64_t>(i + 1000));
    }
    std::vector<AdafactorSlot> slots = {parts[0].slot(), parts[1].slot()};
    for (AdafactorSlot& slot : slots) slot.global_rows = kRows, slot.global_columns = kColumns;
    const auto add_up = [](auto& a, auto& b) {
      for (std::size_t i = 0; i < a.size(); ++i) a[i] = b[i] = a[i] + b[i];
    };
    backend.adafactor_statistics(slots, kGoldenOptions);
    if (by_columns) add_up(parts[0].row_sums, parts[1].row_sums);
    if (!by_columns) add_up(parts[0].column_sums, parts[1].column_sums);
    add_up(parts[0].totals, parts[1].totals);
    const std::array<double, 4> first = parts[0].totals;
    backend.adafactor_moments(slots, kGoldenOptions);
    EXPECT_EQ(first[0], parts[0].totals[0]);  // the second pass leaves the first one's totals alone
    const double update_total = parts[0].totals[2] + parts[1].totals[2];
    // Slices of columns share their rows; slices of rows have some each.
    const double row_total = parts[0].totals[3] + (by_columns ? 0 : parts[1].totals[3]);
    for (HostSlot& part : parts) part.totals = {first[0], first[1], update_total, row_total};
    backend.adafactor_update(slots, kGoldenOptions);
    adafactor_pass(backend, whole.slot(), kGoldenOptions);
    for (index_t i = 0; i < kRows * kColumns; ++i) {
      const index_t r = i / kColumns, c = i % kColumns;
      const HostSlot& part = parts[static_cast<std::size_t>(by_columns ? c / columns : r / rows)];
      EXPECT_NEAR(part.weight[static_cast<std::size_t>(r % rows * columns + c % columns)],
                  whole.weight[static_cast<std::size_t>(i)], 1e-13);
    }
  }
}

// A zero gradient moves nothing, in the smallest moments that epsilon allows too.
TEST(Adafactor, AZeroGradientIsHarmless) {
  CpuBackend backend(2);
  const OpCase factored = adafactor_factored_case(7, 20), full = adafactor_full_case(7, 20);
  for (const OpCase& op : {factored, full}) {
    Instance instance(backend, op, DType::kFloat32);
    for (std::size_t i = 1; i <= 3; ++i) {
      if (op.arguments[i].role == Role::kOutput) continue;
      instance.set(i, Numbers(instance.initial()[i].size(), 0));  // fresh moments
    }
    instance.call();
    EXPECT_EQ(instance.numbers()[0], instance.initial()[0]) << op.name;
  }
}

}  // namespace
}  // namespace regroup::test
