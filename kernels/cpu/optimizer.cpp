#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel_for.h"

namespace regroup {
namespace {

constexpr index_t kSummedPiece = 512;  // elements summed in S before they join a float64 sum

// sum_i x_i^2, in float64 over pieces summed in S.
template <class S>
double sum_of_squares(const S* x, index_t size) {
  double total = 0;
  for (index_t piece = 0; piece < size; piece += kSummedPiece) {
    const index_t last = std::min(size, piece + kSummedPiece);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t i = piece; i < last; ++i) sum += x[i] * x[i];
    total += static_cast<double>(sum);
  }
  return total;
}

// sum_i x_i^2 factor_i, likewise. The square first: a factor that holds 1 / (row column) would not fit.
template <class S>
double sum_of_scaled_squares(const S* x, const S* factor, index_t size) {
  double total = 0;
  for (index_t piece = 0; piece < size; piece += kSummedPiece) {
    const index_t last = std::min(size, piece + kSummedPiece);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t i = piece; i < last; ++i) sum += x[i] * x[i] * factor[i];
    total += static_cast<double>(sum);
  }
  return total;
}

// sums_i += x_i^2; returns what sum_of_squares() does, in one read of x.
template <class S>
double add_squares(const S* x, double* sums, index_t size) {
  double total = 0;
  for (index_t piece = 0; piece < size; piece += kSummedPiece) {
    const index_t last = std::min(size, piece + kSummedPiece);
    total += sum_of_squares(x + piece, last - piece);
#pragma omp simd
    for (index_t i = piece; i < last; ++i) sums[i] += static_cast<double>(x[i] * x[i]);
  }
  return total;
}

// v = beta2 v + rest (g^2 + epsilon); returns sum g^2 / v.
template <class S>
double decay_squares(S* v, const S* g, S beta2, S rest, S epsilon, index_t size) {
  double total = 0;
  for (index_t piece = 0; piece < size; piece += kSummedPiece) {
    const index_t last = std::min(size, piece + kSummedPiece);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t i = piece; i < last; ++i) {
      const S square = g[i] * g[i];
      const S moment = beta2 * v[i] + rest * (square + epsilon);
      v[i] = moment;
      sum += square / moment;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// Runs body(begin, end, partial) on fixed blocks and adds the blocks' `partial`s up in their order.
struct Pair {
  double first = 0, second = 0;
};
template <class Body>
Pair sum_blocks(int threads, index_t size, index_t block, Body&& body) {
  constexpr index_t kBlocks = 64;  // what rows_per_block() allows
  Pair partials[kBlocks];
  parallel_for(threads, size, block,
               [&](index_t begin, index_t end) { body(begin, end, partials[begin / block]); });
  Pair total;
  for (const Pair& partial : partials) {
    total.first += partial.first;
    total.second += partial.second;
  }
  return total;
}

// Blocks of a flat array.
index_t flat_block(index_t size) { return rows_per_block(size, 1); }

template <class S>
Pair sums_of_squares(int threads, const S* w, const S* g, index_t size) {
  return sum_blocks(threads, size, flat_block(size), [=](index_t begin, index_t end, Pair& partial) {
    partial.first += sum_of_squares(w + begin, end - begin);
    partial.second += sum_of_squares(g + begin, end - begin);
  });
}

// The sums over rows and columns of g^2 + e1, besides those of w^2 and g^2. `partial_columns` holds a float64
// row for each block.
template <class S>
Pair factored_statistics(int threads, const AdafactorSlot& slot, double epsilon, double* partial_columns) {
  const S *const w = slot.weight.as<S>(), *const g = slot.gradient.as<S>();
  auto *const row_sums = slot.row_sums.as<double>(), *const column_sums = slot.column_sums.as<double>();
  const index_t rows = slot.weight[0], columns = slot.weight[1];
  const index_t block = rows_per_block(rows, columns);
  const Pair totals = sum_blocks(threads, rows, block, [=](index_t begin, index_t end, Pair& partial) {
    double* const sums = partial_columns + begin / block * columns;
    std::fill_n(sums, columns, 0.0);
    for (index_t r = begin; r < end; ++r) {
      const double squares = add_squares(g + r * columns, sums, columns);
      row_sums[r] = squares + static_cast<double>(columns) * epsilon;
      partial.first += sum_of_squares(w + r * columns, columns);
      partial.second += squares;
    }
  });
  parallel_for(threads, columns, 4096, [=](index_t begin, index_t end) {
    std::fill(column_sums + begin, column_sums + end, static_cast<double>(rows) * epsilon);
    for (index_t b = 0; b < divide_up(rows, block); ++b) {
      const double* const sums = partial_columns + b * columns;
#pragma omp simd
      for (index_t c = begin; c < end; ++c) column_sums[c] += sums[c];
    }
  });
  return totals;
}

// x = b2 x + (1 - b2) sums / size; returns sum x.
template <class S>
double decay_towards(S* x, const double* sums, index_t count, double size, double beta2) {
  double total = 0;
  for (index_t i = 0; i < count; ++i) {
    x[i] = static_cast<S>(beta2 * static_cast<double>(x[i]) + (1 - beta2) * sums[i] / size);
    total += static_cast<double>(x[i]);
  }
  return total;
}

template <class S>
void factored_moments(int threads, const AdafactorSlot& slot, double beta2, S* inverse_column) {
  const S* const g = slot.gradient.as<S>();
  S *const row = slot.row.as<S>(), *const column = slot.column.as<S>();
  const index_t rows = slot.weight[0], columns = slot.weight[1];
  auto* const totals = slot.totals.as<double>();
  totals[3] =
      decay_towards(row, slot.row_sums.as<double>(), rows, static_cast<double>(slot.global_columns), beta2);
  decay_towards(column, slot.column_sums.as<double>(), columns, static_cast<double>(slot.global_rows), beta2);
#pragma omp simd
  for (index_t c = 0; c < columns; ++c) inverse_column[c] = S{1} / column[c];
  const auto sum = [=](index_t begin, index_t end, Pair& partial) {
    for (index_t r = begin; r < end; ++r) {
      partial.first +=
          sum_of_scaled_squares(g + r * columns, inverse_column, columns) / static_cast<double>(row[r]);
    }
  };
  totals[2] = sum_blocks(threads, rows, rows_per_block(rows, columns), sum).first;
}

template <class S>
void full_moments(int threads, const AdafactorSlot& slot, const AdafactorOptions& options) {
  const S* const g = slot.gradient.as<S>();
  S* const v = slot.second_moment.as<S>();
  const S beta2 = static_cast<S>(options.beta2), rest = static_cast<S>(1 - options.beta2);
  const S epsilon = static_cast<S>(options.epsilon_gradient);
  const index_t size = slot.weight.numel();
  auto* const totals = slot.totals.as<double>();
  const auto sum = [=](index_t begin, index_t end, Pair& partial) {
    partial.first += decay_squares(v + begin, g + begin, beta2, rest, epsilon, end - begin);
  };
  totals[2] = sum_blocks(threads, size, flat_block(size), sum).first;
  totals[3] = 0;
}

// w -= factor u, with u as adafactor_update() states it but for its row-wise factor root(m / row).
template <class S>
void factored_update(int threads, const AdafactorSlot& slot, double factor, double mean_row,
                     S* inverse_root_column) {
  S* const w = slot.weight.as<S>();
  const S *const g = slot.gradient.as<S>(), *const row = slot.row.as<S>(),
                 *const column = slot.column.as<S>();
  const index_t rows = slot.weight[0], columns = slot.weight[1];
#pragma omp simd
  for (index_t c = 0; c < columns; ++c) inverse_root_column[c] = S{1} / std::sqrt(column[c]);
  parallel_for(threads, rows, rows_per_block(rows, columns), [=](index_t begin, index_t end) {
    for (index_t r = begin; r < end; ++r) {
      S* const wr = w + r * columns;
      const S* const gr = g + r * columns;
      const S scale = static_cast<S>(factor * std::sqrt(mean_row / static_cast<double>(row[r])));
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) wr[c] -= scale * (gr[c] * inverse_root_column[c]);
    }
  });
}

template <class S>
void full_update(int threads, const AdafactorSlot& slot, double factor) {
  S* const w = slot.weight.as<S>();
  const S *const g = slot.gradient.as<S>(), *const v = slot.second_moment.as<S>();
  const index_t size = slot.weight.numel();
  parallel_for(threads, size, flat_block(size), [=](index_t begin, index_t end) {
#pragma omp simd
    for (index_t i = begin; i < end; ++i) w[i] -= static_cast<S>(factor) * (g[i] / std::sqrt(v[i]));
  });
}

template <class S>
void adamw_step(int threads, const AdamWSlot& slot, const AdamWOptions& options) {
  S* const w = slot.weight.as<S>();
  const S* const g = slot.gradient.as<S>();
  S *const m = slot.first_moment.as<S>(), *const v = slot.second_moment.as<S>();
  const auto step = static_cast<double>(options.step);
  const double rms = std::sqrt(slot.totals.as<double>()[0] / static_cast<double>(slot.global_size));
  const double scale = options.scale_by_rms ? std::max(options.epsilon_parameter, rms) : 1.0;
  const S beta1 = static_cast<S>(options.beta1), rest1 = static_cast<S>(1 - options.beta1);
  const S beta2 = static_cast<S>(options.beta2), rest2 = static_cast<S>(1 - options.beta2);
  const S rate = static_cast<S>(options.learning_rate * scale / (1 - std::pow(options.beta1, step)));
  const S correction2 = static_cast<S>(1 / (1 - std::pow(options.beta2, step)));
  const S epsilon = static_cast<S>(options.epsilon);
  const S decay = static_cast<S>(slot.decay ? options.learning_rate * options.weight_decay : 0.0);
  const index_t size = slot.weight.numel();
  parallel_for(threads, size, flat_block(size), [=](index_t begin, index_t end) {
#pragma omp simd
    for (index_t i = begin; i < end; ++i) {
      m[i] = beta1 * m[i] + rest1 * g[i];
      v[i] = beta2 * v[i] + rest2 * (g[i] * g[i]);
      w[i] -= rate * (m[i] / (std::sqrt(v[i] * correction2) + epsilon)) + decay * w[i];
    }
  });
}

}  // namespace

void CpuBackend::do_adafactor_statistics(std::span<const AdafactorSlot> slots,
                                         const AdafactorOptions& options) {
  for (const AdafactorSlot& slot : slots) {
    dispatch(slot.weight.dtype, [&]<class T>() {
      using S = stat_t<T>;
      const index_t rows = slot.weight[0], columns = slot.weight[1];
      Pair squares;
      if (slot.second_moment) {
        squares = sums_of_squares(threads_, slot.weight.as<S>(), slot.gradient.as<S>(), rows * columns);
      } else {
        const index_t blocks = divide_up(rows, rows_per_block(rows, columns));
        std::byte* const memory = workspace(blocks * columns * static_cast<index_t>(sizeof(double)));
        squares = factored_statistics<S>(threads_, slot, options.epsilon_gradient,
                                         reinterpret_cast<double*>(memory));
      }
      slot.totals.as<double>()[0] = squares.first;
      slot.totals.as<double>()[1] = squares.second;
    });
  }
}

void CpuBackend::do_adafactor_moments(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) {
  for (const AdafactorSlot& slot : slots) {
    dispatch(slot.weight.dtype, [&]<class T>() {
      using S = stat_t<T>;
      if (slot.second_moment) return full_moments<S>(threads_, slot, options);
      std::byte* const memory = workspace(slot.weight[1] * static_cast<index_t>(sizeof(S)));
      factored_moments(threads_, slot, options.beta2, reinterpret_cast<S*>(memory));
    });
  }
}

void CpuBackend::do_adafactor_update(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) {
  for (const AdafactorSlot& slot : slots) {
    const auto* const totals = slot.totals.as<double>();
    const auto rows = static_cast<double>(slot.global_rows);
    const double size = rows * static_cast<double>(slot.global_columns);
    const double mean_row = slot.second_moment ? 1.0 : totals[3] / rows;
    const double rms_update = std::sqrt(mean_row * totals[2] / size);
    const double factor = options.learning_rate *
                          std::max(options.epsilon_parameter, std::sqrt(totals[0] / size)) /
                          std::max(1.0, rms_update / options.clipping_threshold);
    dispatch(slot.weight.dtype, [&]<class T>() {
      using S = stat_t<T>;
      if (slot.second_moment) return full_update<S>(threads_, slot, factor);
      std::byte* const memory = workspace(slot.weight[1] * static_cast<index_t>(sizeof(S)));
      factored_update(threads_, slot, factor, mean_row, reinterpret_cast<S*>(memory));
    });
  }
}

void CpuBackend::do_adamw_statistics(std::span<const AdamWSlot> slots) {
  for (const AdamWSlot& slot : slots) {
    dispatch(slot.weight.dtype, [&]<class T>() {
      using S = stat_t<T>;
      const Pair squares =
          sums_of_squares(threads_, slot.weight.as<S>(), slot.gradient.as<S>(), slot.weight.numel());
      slot.totals.as<double>()[0] = squares.first;
      slot.totals.as<double>()[1] = squares.second;
    });
  }
}

void CpuBackend::do_adamw_update(std::span<const AdamWSlot> slots, const AdamWOptions& options) {
  for (const AdamWSlot& slot : slots) {
    dispatch(slot.weight.dtype, [&]<class T>() { adamw_step<stat_t<T>>(threads_, slot, options); });
  }
}

}  // namespace regroup
