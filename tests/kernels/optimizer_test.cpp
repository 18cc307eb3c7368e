// Adafactor on every device: golden values of t5x/adafactor_test.py, slices of a matrix, degenerate
// gradients.
#include <array>

#include <gtest/gtest.h>

#include "tests/kernels/optimizer_cases.h"
#include "tests/support/devices.h"

namespace regroup::test {
namespace {

constexpr double kBeta2AtStep1 = 0.42565082250148245;  // 1 - 2^-0.8
constexpr AdafactorOptions kGoldenOptions{.beta2 = kBeta2AtStep1, .learning_rate = 0.1};

// One Adafactor slot of a [rows, columns] matrix in float64: its numbers on the host and their place on a
// device.
class Slot {
 public:
  Slot(Backend& backend, index_t rows, index_t columns, double w, double g, bool factored = true)
      : weight(static_cast<std::size_t>(rows * columns), w),
        gradient(weight.size(), g),
        row(static_cast<std::size_t>(rows)),
        column(static_cast<std::size_t>(columns)),
        row_sums(row.size()),
        column_sums(column.size()),
        second_moment(weight.size()),
        totals(4),
        backend_(backend),
        rows_(rows),
        columns_(columns),
        factored_(factored) {
    for (const Part part : kParts) memory_.push_back(backend.allocate(bytes(part)));
  }

  // The slot on the device, with the numbers of the host.
  AdafactorSlot upload() {
    std::vector<Tensor> t;
    for (std::size_t i = 0; i < kParts.size(); ++i) {
      t.push_back(memory_[i].tensor(DType::kFloat64, {bytes(kParts[i]) / 8}));
      backend_.copy_from_host((this->*kParts[i]).data(), t[i]);
    }
    AdafactorSlot slot{.weight = t[0].reshape({rows_, columns_}),
                       .gradient = t[1].reshape({rows_, columns_}),
                       .totals = t[7],
                       .global_rows = rows_,
                       .global_columns = columns_};
    if (factored_) slot.row = t[2], slot.column = t[3], slot.row_sums = t[4], slot.column_sums = t[5];
    if (!factored_) slot.second_moment = t[6].reshape({rows_, columns_});
    return slot;
  }
  // The numbers of the device.
  void download() {
    for (std::size_t i = 0; i < kParts.size(); ++i) {
      backend_.copy_to_host(memory_[i].tensor(DType::kFloat64, {bytes(kParts[i]) / 8}),
                            (this->*kParts[i]).data());
    }
  }
  void pass() {
    adafactor_pass(backend_, upload(), kGoldenOptions);
    download();
  }

  std::vector<double> weight, gradient, row, column, row_sums, column_sums, second_moment, totals;

 private:
  using Part = std::vector<double> Slot::*;
  static constexpr std::array<Part, 8> kParts = {&Slot::weight,        &Slot::gradient, &Slot::row,
                                                 &Slot::column,        &Slot::row_sums, &Slot::column_sums,
                                                 &Slot::second_moment, &Slot::totals};
  index_t bytes(Part part) const { return static_cast<index_t>((this->*part).size() * sizeof(double)); }

  Backend& backend_;
  index_t rows_, columns_;
  bool factored_;
  std::vector<Buffer> memory_;
};

class AdafactorTest : public testing::TestWithParam<DeviceKind> {
 protected:
  const std::unique_ptr<Backend> backend_ = make_test_backend(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Devices, AdafactorTest, testing::ValuesIn(test_devices()),
                         [](const auto& instance) { return name_of(instance.param); });

// T5X: params ones(3, 2), gradient ones, v_row .9, v_col .1, step 1, lr .1. Its v_row belongs to the smaller
// dimension, here the rows: the matrix is transposed. (The update divides by the mean of v_row. Moments that
// come from gradients have the same mean in rows and columns; these have not.)
TEST_P(AdafactorTest, FactoredGoldenValues) {
  Slot host(*backend_, 2, 3, 1, 1);
  host.row.assign(2, 0.9);
  host.column.assign(3, 0.1);
  host.pass();
  for (const double v : host.row) EXPECT_NEAR(v, 0.9574349, 5e-8);
  for (const double v : host.column) EXPECT_NEAR(v, 0.6169143, 5e-8);
  for (const double w : host.weight) EXPECT_NEAR(w, 0.9, 1e-12);
}

// The same with the gradient clipped to a global norm of 1: each element becomes 1 / sqrt(6).
TEST_P(AdafactorTest, FactoredGoldenValuesOfAClippedGradient) {
  Slot host(*backend_, 2, 3, 1, 1 / std::sqrt(6.0));
  host.row.assign(2, 0.9);
  host.column.assign(3, 0.1);
  host.pass();
  for (const double v : host.row) EXPECT_NEAR(v, 0.478811, 5e-7);
  for (const double v : host.column) EXPECT_NEAR(v, 0.13829, 5e-6);
  for (const double w : host.weight) EXPECT_NEAR(w, 0.9, 1e-12);
}

TEST_P(AdafactorTest, FullGoldenValues) {
  Slot host(*backend_, 3, 2, 1, 1, false);
  host.second_moment.assign(6, 0.5);
  host.pass();
  for (const double v : host.second_moment) EXPECT_NEAR(v, 0.787174, 1e-6);
  for (const double w : host.weight) EXPECT_NEAR(w, 0.9, 1e-12);
}

// A matrix in two slices of columns, or of rows, whose totals and shared sums are added up between the
// passes, is updated as the whole is.
TEST_P(AdafactorTest, SlicesAddUpToTheWhole) {
  constexpr index_t kRows = 12, kColumns = 10;
  const Philox random(6, RandomPurpose::kTest);
  for (const bool by_columns : {true, false}) {
    Slot whole(*backend_, kRows, kColumns, 0, 0);
    const index_t rows = by_columns ? kRows : kRows / 2, columns = by_columns ? kColumns / 2 : kColumns;
    std::vector<Slot> parts;
    for (int i = 0; i < 2; ++i) parts.emplace_back(*backend_, rows, columns, 0.0, 0.0);
    for (index_t i = 0; i < kRows * kColumns; ++i) {
      const index_t r = i / kColumns, c = i % kColumns;
      Slot& part = parts[static_cast<std::size_t>(by_columns ? c / columns : r / rows)];
      const auto at = static_cast<std::size_t>(r % rows * columns + c % columns);
      whole.weight[static_cast<std::size_t>(i)] = part.weight[at] =
          random.normal(static_cast<std::uint64_t>(i));
      whole.gradient[static_cast<std::size_t>(i)] = part.gradient[at] =
          random.normal(static_cast<std::uint64_t>(i + 1000));
    }
    // An op on both slices, from and to the host.
    const auto run = [&](void (Backend::*op)(std::span<const AdafactorSlot>, const AdafactorOptions&)) {
      std::vector<AdafactorSlot> slots = {parts[0].upload(), parts[1].upload()};
      for (AdafactorSlot& slot : slots) slot.global_rows = kRows, slot.global_columns = kColumns;
      (backend_.get()->*op)(slots, kGoldenOptions);
      for (Slot& part : parts) part.download();
    };
    const auto add_up = [](auto& a, auto& b) {
      for (std::size_t i = 0; i < a.size(); ++i) a[i] = b[i] = a[i] + b[i];
    };
    run(&Backend::adafactor_statistics);
    if (by_columns) add_up(parts[0].row_sums, parts[1].row_sums);
    if (!by_columns) add_up(parts[0].column_sums, parts[1].column_sums);
    add_up(parts[0].totals, parts[1].totals);
    const std::vector<double> first = parts[0].totals;
    run(&Backend::adafactor_moments);
    EXPECT_EQ(first[0], parts[0].totals[0]);  // the second pass leaves the first one's totals alone
    const double update_total = parts[0].totals[2] + parts[1].totals[2];
    // Slices of columns share their rows; slices of rows have some each.
    const double row_total = parts[0].totals[3] + (by_columns ? 0 : parts[1].totals[3]);
    for (Slot& part : parts) part.totals = {first[0], first[1], update_total, row_total};
    run(&Backend::adafactor_update);
    whole.pass();
    for (index_t i = 0; i < kRows * kColumns; ++i) {
      const index_t r = i / kColumns, c = i % kColumns;
      const Slot& part = parts[static_cast<std::size_t>(by_columns ? c / columns : r / rows)];
      EXPECT_NEAR(part.weight[static_cast<std::size_t>(r % rows * columns + c % columns)],
                  whole.weight[static_cast<std::size_t>(i)], 1e-13);
    }
  }
}

// A zero gradient moves nothing, in the smallest moments that epsilon allows too.
TEST_P(AdafactorTest, AZeroGradientIsHarmless) {
  const OpCase factored = adafactor_factored_case(7, 20), full = adafactor_full_case(7, 20);
  for (const OpCase& op : {factored, full}) {
    Instance instance(*backend_, op, DType::kFloat32);
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
