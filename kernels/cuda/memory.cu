#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/elementwise.cuh"

namespace regroup {
namespace {

constexpr int kLeading = Tensor::kMaxRank - 1;

// Two tensors of one shape as rows of `columns` units of memory; strides in units.
struct RowLayout {
  index_t columns = 1;
  index_t extent[kLeading] = {1, 1, 1};
  index_t from[kLeading] = {}, to[kLeading] = {};
};

template <class Unit>
struct CopyRows {
  const Unit* from;
  Unit* to;
  RowLayout layout;

  template <int N>
  __device__ void apply(index_t i) const {
    static_assert(N == 1);
    index_t row = quotient(i, layout.columns);
    const index_t column = i - row * layout.columns;
    index_t read = column, written = column;
#pragma unroll
    for (int dim = kLeading - 1; dim >= 0; --dim) {
      const index_t outer = quotient(row, layout.extent[dim]), at = row - outer * layout.extent[dim];
      read += at * layout.from[dim];
      written += at * layout.to[dim];
      row = outer;
    }
    to[written] = from[read];
  }
};

template <class From, class To>
struct Cast {
  const From* x;
  To* y;
  template <int N>
  __device__ void apply(index_t i) const {
    stat_t<From> values[N];
    load_values(x + i, values);
    store_values(y + i, values);
  }
};

template <class T>
struct Add {
  const T *a, *b;
  T* y;
  template <int N>
  __device__ void apply(index_t i) const {
    stat_t<T> sum[N], other[N];
    load_values(a + i, sum);
    load_values(b + i, other);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += other[j];
    store_values(y + i, sum);
  }
};

template <class T>
struct Scale {
  T* x;
  stat_t<T> factor;
  template <int N>
  __device__ void apply(index_t i) const {
    stat_t<T> values[N];
    load_values(x + i, values);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] *= factor;
    store_values(x + i, values);
  }
};

RowLayout row_layout(const Tensor& x, const Tensor& y) {
  RowLayout layout;
  if (x.rank == 0) return layout;
  layout.columns = x[x.rank - 1];
  for (int dim = 0; dim < x.rank - 1; ++dim) {
    const int to = kLeading - (x.rank - 1) + dim;
    const auto from = static_cast<std::size_t>(dim);
    layout.extent[to] = x[dim];
    layout.from[to] = x.stride[from];
    layout.to[to] = y.stride[from];
  }
  return layout;
}

// The largest access, up to 16 bytes, that divides rows, strides and addresses.
index_t access_bytes(const Tensor& x, const Tensor& y, const RowLayout& layout) {
  const index_t element = size_of(x.dtype);
  auto common = reinterpret_cast<std::uintptr_t>(x.data) | reinterpret_cast<std::uintptr_t>(y.data) |
                static_cast<std::uintptr_t>(layout.columns * element) | 16;
  for (int dim = 0; dim < kLeading; ++dim) {
    common |= static_cast<std::uintptr_t>(layout.from[dim] * element) |
              static_cast<std::uintptr_t>(layout.to[dim] * element);
  }
  return static_cast<index_t>(common & (~common + 1));
}

template <class Unit>
void copy_rows(CudaDevice& device, const Tensor& x, const Tensor& y, RowLayout layout) {
  const index_t element = size_of(x.dtype), unit = sizeof(Unit);
  layout.columns = layout.columns * element / unit;
  index_t rows = 1;
  for (int dim = 0; dim < kLeading; ++dim) {
    layout.from[dim] = layout.from[dim] * element / unit;
    layout.to[dim] = layout.to[dim] * element / unit;
    rows *= layout.extent[dim];
  }
  const CopyRows<Unit> op{static_cast<const Unit*>(x.data), static_cast<Unit*>(y.data), layout};
  map<1>(device, op, rows * layout.columns, false);
}

}  // namespace

void CudaBackend::do_fill_zero(Tensor x) {
  check_cuda(cudaMemsetAsync(x.data, 0, static_cast<std::size_t>(x.bytes()), device_.stream()),
             "cudaMemsetAsync");
}

void CudaBackend::do_copy(Tensor x, Tensor y) {
  if (x.is_contiguous() && y.is_contiguous()) {
    check_cuda(cudaMemcpyAsync(y.data, x.data, static_cast<std::size_t>(x.bytes()), cudaMemcpyDeviceToDevice,
                               device_.stream()),
               "cudaMemcpyAsync on the device");
    return;
  }
  const RowLayout layout = row_layout(x, y);
  switch (access_bytes(x, y, layout)) {
    case 16:
      return copy_rows<uint4>(device_, x, y, layout);
    case 8:
      return copy_rows<uint2>(device_, x, y, layout);
    case 4:
      return copy_rows<unsigned>(device_, x, y, layout);
    default:
      return copy_rows<unsigned short>(device_, x, y, layout);
  }
}

void CudaBackend::do_cast(Tensor x, Tensor y) {
  if (x.dtype == y.dtype) return do_copy(x, y);
  dispatch(x.dtype, [&]<class From>() {
    dispatch(y.dtype, [&]<class To>() {
      constexpr int kPack = std::max(kPackSize<From>, kPackSize<To>);
      map<kPack>(device_, Cast<From, To>{x.as<From>(), y.as<To>()}, x.numel(), aligned({x.data, y.data}));
    });
  });
}

void CudaBackend::do_add(Tensor a, Tensor b, Tensor y) {
  dispatch(a.dtype, [&]<class T>() {
    map<kPackSize<T>>(device_, Add<T>{a.as<T>(), b.as<T>(), y.as<T>()}, a.numel(),
                      aligned({a.data, b.data, y.data}));
  });
}

void CudaBackend::do_scale(Tensor x, double factor) {
  dispatch(x.dtype, [&]<class T>() {
    map<kPackSize<T>>(device_, Scale<T>{x.as<T>(), static_cast<stat_t<T>>(factor)}, x.numel(),
                      aligned({x.data}));
  });
}

}  // namespace regroup
