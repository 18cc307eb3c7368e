#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/elementwise.cuh"

namespace regroup {
namespace {

// Of x <= 0, absolute error below 2^-23: what a logistic function needs.
__device__ inline float small_exp(float x) { return __expf(x); }
__device__ inline double small_exp(double x) { return std::exp(x); }
__device__ inline float reciprocal(float x) { return __fdividef(1.0F, x); }
__device__ inline double reciprocal(double x) { return 1.0 / x; }

// gelu(x) = x s(2u), s the logistic function and u = sqrt(2/pi) (x + 0.044715 x^3), and its derivative
// s + x s (1 - s) 2 u'(x); as kernels/cpu/vector_math.h.
template <class S>
struct Gelu {
  S value, derivative;
};
template <class S>
__device__ Gelu<S> gelu(S x) {
  constexpr S kTwoRootTwoOverPi = static_cast<S>(1.5957691216057308);
  constexpr S kCubic = static_cast<S>(0.044715);
  constexpr S kFlat = 30;  // beyond it s is 0 or 1; keeps the cube finite
  const S t = x < -kFlat ? -kFlat : (x > kFlat ? kFlat : x);
  const S square = t * t;
  const S twice_u = kTwoRootTwoOverPi * t * (S{1} + kCubic * square);
  // Of the larger of s and 1 - s, and the other from it, so that neither loses digits.
  const S e = small_exp(twice_u < 0 ? twice_u : -twice_u);
  const S large = reciprocal(S{1} + e);
  const S s = twice_u < 0 ? e * large : large;
  const S slope = kTwoRootTwoOverPi * (S{1} + 3 * kCubic * square);
  return {x * s, s + x * (e * large * large) * slope};
}

template <class T>
struct GatedGelu {
  const T* x;
  T* y;
  DropoutFactors dropout;

  template <int N>
  __device__ void apply(index_t i) const {
    const index_t columns = dropout.columns(), row = quotient(i, columns), column = i - row * columns;
    const T* const from = x + i + row * columns;
    stat_t<T> gate[N], value[N], factor[N];
    load_values(from, gate);
    load_values(from + columns, value);
    dropout.at(row, column, factor);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = gelu(gate[j]).value * value[j] * factor[j];
    store_values(y + i, value);
  }
};

template <class T>
struct GatedGeluBackward {
  const T *dy, *x;
  T* dx;
  DropoutFactors dropout;

  template <int N>
  __device__ void apply(index_t i) const {
    const index_t columns = dropout.columns(), row = quotient(i, columns), column = i - row * columns;
    const index_t at = i + row * columns;
    stat_t<T> gradient[N], gate[N], value[N], factor[N];
    load_values(dy + i, gradient);
    load_values(x + at, gate);
    load_values(x + at + columns, value);
    dropout.at(row, column, factor);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Gelu<stat_t<T>> activated = gelu(gate[j]);
      const stat_t<T> g = gradient[j] * factor[j];
      gate[j] = g * value[j] * activated.derivative;
      value[j] = g * activated.value;
    }
    store_values(dx + at, gate);
    store_values(dx + at + columns, value);
  }
};

template <class T>
struct Relu {
  const T* x;
  T* y;
  DropoutFactors dropout;

  template <int N>
  __device__ void apply(index_t i) const {
    const index_t row = quotient(i, dropout.columns());
    stat_t<T> value[N], factor[N];
    load_values(x + i, value);
    dropout.at(row, i - row * dropout.columns(), factor);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = (value[j] < 0 ? stat_t<T>{0} : value[j]) * factor[j];
    store_values(y + i, value);
  }
};

template <class T>
struct ReluBackward {
  const T *dy, *x;
  T* dx;
  DropoutFactors dropout;

  template <int N>
  __device__ void apply(index_t i) const {
    const index_t row = quotient(i, dropout.columns());
    stat_t<T> gradient[N], value[N], factor[N];
    load_values(dy + i, gradient);
    load_values(x + i, value);
    dropout.at(row, i - row * dropout.columns(), factor);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = value[j] <= 0 ? stat_t<T>{0} : gradient[j] * factor[j];
    store_values(dx + i, value);
  }
};

template <class T>
struct DropoutAdd {
  const T *residual, *x;  // residual may be null
  T* y;
  DropoutFactors dropout;

  template <int N>
  __device__ void apply(index_t i) const {
    const index_t row = quotient(i, dropout.columns());
    stat_t<T> sum[N] = {}, value[N], factor[N];
    if (residual != nullptr) load_values(residual + i, sum);
    load_values(x + i, value);
    dropout.at(row, i - row * dropout.columns(), factor);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += value[j] * factor[j];
    store_values(y + i, sum);
  }
};

}  // namespace

void CudaBackend::do_gated_gelu(Tensor x, Tensor y, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    constexpr int kPack = kPackSize<T>;
    const GatedGelu<T> op{x.as<T>(), y.as<T>(), DropoutFactors(dropout, y[1])};
    map<kPack>(device_, op, y.numel(), in_packs<kPack>(y[1], {x.data, y.data}));
  });
}

void CudaBackend::do_gated_gelu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    constexpr int kPack = kPackSize<T>;
    const GatedGeluBackward<T> op{dy.as<T>(), x.as<T>(), dx.as<T>(), DropoutFactors(dropout, dy[1])};
    map<kPack>(device_, op, dy.numel(), in_packs<kPack>(dy[1], {dy.data, x.data, dx.data}));
  });
}

void CudaBackend::do_relu(Tensor x, Tensor y, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    constexpr int kPack = kPackSize<T>;
    const Relu<T> op{x.as<T>(), y.as<T>(), DropoutFactors(dropout, x[1])};
    map<kPack>(device_, op, x.numel(), in_packs<kPack>(x[1], {x.data, y.data}));
  });
}

void CudaBackend::do_relu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    constexpr int kPack = kPackSize<T>;
    const ReluBackward<T> op{dy.as<T>(), x.as<T>(), dx.as<T>(), DropoutFactors(dropout, x[1])};
    map<kPack>(device_, op, x.numel(), in_packs<kPack>(x[1], {dy.data, x.data, dx.data}));
  });
}

void CudaBackend::do_dropout_add(Tensor residual, Tensor x, Tensor y, const Dropout& dropout) {
  dispatch(x.dtype, [&]<class T>() {
    constexpr int kPack = kPackSize<T>;
    const DropoutAdd<T> op{residual ? residual.as<T>() : nullptr, x.as<T>(), y.as<T>(),
                           DropoutFactors(dropout, x[1])};
    map<kPack>(device_, op, x.numel(), in_packs<kPack>(x[1], {residual.data, x.data, y.data}));
  });
}

void CudaBackend::do_dropout_backward(Tensor dy, Tensor dx, const Dropout& dropout) {
  do_dropout_add(Tensor(), dy, dx, dropout);
}

}  // namespace regroup
