#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"

namespace regroup {
namespace {

template <class T>
stat_t<T> squares_of_row(const T* x, index_t size) {
  using S = stat_t<T>;
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (index_t d = 0; d < size; ++d) sum += static_cast<S>(x[d]) * static_cast<S>(x[d]);
  return sum;
}

// sum_d w dy x
template <class T>
stat_t<T> weighted_dot(const T* w, const T* dy, const T* x, index_t size) {
  using S = stat_t<T>;
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (index_t d = 0; d < size; ++d) {
    sum += static_cast<S>(w[d]) * static_cast<S>(dy[d]) * static_cast<S>(x[d]);
  }
  return sum;
}

// dx of one row, and its share of dw added to `dw`. `residual` may be null.
template <class T, class S = stat_t<T>>
void row_backward(const T* dy, const T* x, const T* w, S r, const T* residual, T* dx, S* dw, index_t size) {
  const S slope = r * r * weighted_dot(w, dy, x, size) / static_cast<S>(size);
  if (residual == nullptr) {
#pragma omp simd
    for (index_t d = 0; d < size; ++d) {
      const S g = static_cast<S>(dy[d]), v = static_cast<S>(x[d]);
      dw[d] += g * v * r;
      store(dx[d], r * (static_cast<S>(w[d]) * g - v * slope));
    }
    return;
  }
#pragma omp simd
  for (index_t d = 0; d < size; ++d) {
    const S g = static_cast<S>(dy[d]), v = static_cast<S>(x[d]);
    dw[d] += g * v * r;
    store(dx[d], static_cast<S>(residual[d]) + r * (static_cast<S>(w[d]) * g - v * slope));
  }
}

}  // namespace

void CpuBackend::do_rms_norm(Tensor x, Tensor weight, Tensor y, Tensor inverse_rms, double epsilon) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const T *const px = x.as<T>(), *const w = weight.as<T>();
    T* const py = y.as<T>();
    S* const rs = inverse_rms.as<S>();
    const index_t columns = x[1];
    parallel_for(threads_, x[0], rows_per_block(x[0], columns), [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) {
        const T* const row = px + n * columns;
        T* const out = py + n * columns;
        const S mean = squares_of_row(row, columns) / static_cast<S>(columns);
        const S r = S{1} / std::sqrt(mean + static_cast<S>(epsilon));
        rs[n] = r;
#pragma omp simd
        for (index_t d = 0; d < columns; ++d) {
          store(out[d], static_cast<S>(w[d]) * (static_cast<S>(row[d]) * r));
        }
      }
    });
  });
}

void CpuBackend::do_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse_rms,
                                      Tensor residual_gradient, Tensor dx, Tensor dw) {
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const T *const pdy = dy.as<T>(), *const px = x.as<T>(), *const w = weight.as<T>();
    const T* const residual = residual_gradient ? residual_gradient.as<T>() : nullptr;
    const S* const rs = inverse_rms.as<S>();
    T* const pdx = dx.as<T>();
    S* const pdw = dw.as<S>();
    const index_t columns = x[1], block = rows_per_block(x[0], columns), blocks = divide_up(x[0], block);
    // A sum over the rows of each block, then over the blocks in their order.
    S* const partial = reinterpret_cast<S*>(workspace(blocks * columns * static_cast<index_t>(sizeof(S))));
    parallel_for(threads_, x[0], block, [&](index_t begin, index_t end) {
      S* const sum = partial + begin / block * columns;
      std::fill_n(sum, columns, S{0});
      for (index_t n = begin; n < end; ++n) {
        const index_t at = n * columns;
        row_backward(pdy + at, px + at, w, rs[n], residual == nullptr ? nullptr : residual + at, pdx + at,
                     sum, columns);
      }
    });
    for (index_t b = 0; b < blocks; ++b) {
      const S* const sum = partial + b * columns;
#pragma omp simd
      for (index_t d = 0; d < columns; ++d) pdw[d] += sum[d];
    }
  });
}

}  // namespace regroup
