#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/dropout_mask.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"

namespace regroup {
namespace {

constexpr index_t kDropoutPiece = 1024;  // columns whose dropout factors are on the stack at a time

// Calls body(row, first column, columns, factors) for pieces of a [rows, columns] matrix; `factors` holds
// dropout's factor of each element of the piece, or is null where dropout is off.
template <class S, class Body>
void for_each_piece(int threads, index_t rows, index_t columns, const Dropout& dropout, Body&& body) {
  const DropoutMask mask(dropout.key, dropout.rate);
  parallel_for(threads, rows, rows_per_block(rows, columns), [&](index_t begin, index_t end) {
    if (!mask.active()) {
      for (index_t row = begin; row < end; ++row) body(row, 0, columns, static_cast<const S*>(nullptr));
      return;
    }
    alignas(64) S factors[kDropoutPiece];
    for (index_t row = begin; row < end; ++row) {
      for (index_t column = 0; column < columns; column += kDropoutPiece) {
        const index_t size = std::min(kDropoutPiece, columns - column);
        const index_t first = (dropout.first_row + row) * dropout.columns + dropout.first_column + column;
        mask.factors(first, size, factors);
        body(row, column, size, static_cast<const S*>(factors));
      }
    }
  });
}

// The loop `for i < size: body(i, factor)`, once with dropout and once, cheaper, without.
template <class S, class Body>
inline void with_factors(const S* factors, index_t size, Body&& body) {
  if (factors == nullptr) {
#pragma omp simd
    for (index_t i = 0; i < size; ++i) body(i, S{1});
    return;
  }
#pragma omp simd
  for (index_t i = 0; i < size; ++i) body(i, factors[i]);
}

}  // namespace

void CpuBackend::do_gated_gelu(Tensor x, Tensor y, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t columns = y[1];
    const T* const px = x.as<T>();
    T* const py = y.as<T>();
    for_each_piece<S>(threads_, y[0], columns, dropout,
                      [&](index_t row, index_t column, index_t size, const S* factors) {
                        const T* const gate = px + row * 2 * columns + column;
                        const T* const value = gate + columns;
                        T* const out = py + row * columns + column;
                        with_factors(factors, size, [=](index_t i, S factor) {
                          const S activated = vector_gelu(static_cast<S>(gate[i])).value;
                          store(out[i], activated * static_cast<S>(value[i]) * factor);
                        });
                      });
  });
}

void CpuBackend::do_gated_gelu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t columns = dy[1];
    const T *const px = x.as<T>(), *const pdy = dy.as<T>();
    T* const pdx = dx.as<T>();
    for_each_piece<S>(threads_, dy[0], columns, dropout,
                      [&](index_t row, index_t column, index_t size, const S* factors) {
                        const index_t at = row * 2 * columns + column;
                        const T *const gate = px + at, *const value = gate + columns;
                        const T* const gradient = pdy + row * columns + column;
                        T *const dgate = pdx + at, *const dvalue = dgate + columns;
                        with_factors(factors, size, [=](index_t i, S factor) {
                          const S g = static_cast<S>(gradient[i]) * factor;
                          const Gelu<S> gelu = vector_gelu(static_cast<S>(gate[i]));
                          store(dgate[i], g * static_cast<S>(value[i]) * gelu.derivative);
                          store(dvalue[i], g * gelu.value);
                        });
                      });
  });
}

void CpuBackend::do_relu(Tensor x, Tensor y, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t columns = x[1];
    const T* const px = x.as<T>();
    T* const py = y.as<T>();
    for_each_piece<S>(threads_, x[0], columns, dropout,
                      [&](index_t row, index_t column, index_t size, const S* factors) {
                        const T* const in = px + row * columns + column;
                        T* const out = py + row * columns + column;
                        with_factors(factors, size, [=](index_t i, S factor) {
                          const S value = static_cast<S>(in[i]);
                          store(out[i], (value < 0 ? S{0} : value) * factor);
                        });
                      });
  });
}

void CpuBackend::do_relu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t columns = x[1];
    const T *const px = x.as<T>(), *const pdy = dy.as<T>();
    T* const pdx = dx.as<T>();
    for_each_piece<S>(threads_, x[0], columns, dropout,
                      [&](index_t row, index_t column, index_t size, const S* factors) {
                        const index_t at = row * columns + column;
                        const T *const in = px + at, *const gradient = pdy + at;
                        T* const out = pdx + at;
                        with_factors(factors, size, [=](index_t i, S factor) {
                          const S g = static_cast<S>(gradient[i]) * factor;
                          store(out[i], static_cast<S>(in[i]) <= 0 ? S{0} : g);
                        });
                      });
  });
}

void CpuBackend::do_dropout_add(Tensor residual, Tensor x, Tensor y, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t columns = x[1];
    const T* const px = x.as<T>();
    const T* const pr = residual ? residual.as<T>() : nullptr;
    T* const py = y.as<T>();
    for_each_piece<S>(
        threads_, x[0], columns, dropout, [&](index_t row, index_t column, index_t size, const S* factors) {
          const index_t at = row * columns + column;
          const T *const in = px + at, *const r = pr + (pr == nullptr ? 0 : at);
          T* const out = py + at;
          if (pr == nullptr) {
            with_factors(factors, size,
                         [=](index_t i, S factor) { store(out[i], static_cast<S>(in[i]) * factor); });
          } else {
            with_factors(factors, size, [=](index_t i, S factor) {
              store(out[i], static_cast<S>(r[i]) + static_cast<S>(in[i]) * factor);
            });
          }
        });
  });
}

void CpuBackend::do_dropout_backward(Tensor dy, Tensor dx, const Dropout& dropout) {
  do_dropout_add(Tensor(), dy, dx, dropout);
}

}  // namespace regroup
