#include "kernels/cpu/cpu_backend.h"

#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#include <omp.h>

#include "kernels/cpu/onednn_matmul.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"

namespace regroup {
namespace {

constexpr index_t kBlock = index_t{1} << 15;  // elements per block of a flat loop

// Calls body(x row, y row) for every row of two tensors of one shape whose rows may be strided.
template <class Body>
void for_each_row(const Tensor& x, const Tensor& y, Body&& body) {
  const auto at = [](const Tensor& t, index_t row) {
    index_t offset = 0;
    for (int dim = t.rank - 2; dim >= 0; --dim) {
      offset += row % t[dim] * t.stride[static_cast<std::size_t>(dim)];
      row /= t[dim];
    }
    return static_cast<std::byte*>(t.data) + offset * size_of(t.dtype);
  };
  const index_t columns = x.rank == 0 ? 1 : x[x.rank - 1];
  const index_t rows = columns == 0 ? 0 : x.numel() / columns;
  for (index_t row = 0; row < rows; ++row) body(at(x, row), at(y, row), columns);
}

}  // namespace

CpuBackend::CpuBackend(CpuLevel level, int threads)
    : level_(level),
      threads_(threads > 0 ? threads : omp_get_max_threads()),
      multiplies_bfloat16_(processor_multiplies_bfloat16(level)),
      matmul_(std::make_unique<OneDnnMatmul>(threads_)) {}

CpuBackend::~CpuBackend() = default;

Buffer CpuBackend::allocate(index_t bytes) {
  constexpr std::size_t kCacheLine = 64;
  return allocate_aligned(bytes, kCacheLine);
}

Buffer CpuBackend::allocate_host(index_t bytes) {
  constexpr index_t kHugePage = index_t{1} << 21;
  return bytes < kHugePage ? allocate(bytes) : allocate_aligned(bytes, kHugePage);
}

// Whole units of `alignment`; large ones in huge pages.
Buffer CpuBackend::allocate_aligned(index_t bytes, std::size_t alignment) const {
  check(bytes >= 0, "a buffer of {} bytes was asked for", bytes);
  const std::size_t size = (static_cast<std::size_t>(bytes) + alignment) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, size);
  if (memory == nullptr) {
    throw UserError(
        "{} bytes of memory were asked for and this host has not so many: a smaller --micro-batch, "
        "--recompute "
        "on or a larger --tensor-parallel needs less",
        bytes);
  }
  constexpr std::size_t kPage = 4096;
  if (alignment > kPage) ::madvise(memory, size, MADV_HUGEPAGE);  // or not
  // Each thread touches its part first, so that pages lie near the core that will use them.
  parallel_for(threads_, static_cast<index_t>(size), index_t{1} << 22, [&](index_t begin, index_t end) {
    std::memset(static_cast<std::byte*>(memory) + begin, 0, static_cast<std::size_t>(end - begin));
  });
  return Buffer(memory, bytes, std::free);
}

std::byte* CpuBackend::workspace(index_t bytes) {
  if (workspace_.bytes() < bytes) {
    workspace_ = Buffer();  // before, so that the two never exist together
    workspace_ = allocate(bytes);
  }
  return static_cast<std::byte*>(workspace_.data());
}

std::string CpuBackend::describe() const {
  return fmt::format("CPU ({}), {} threads", name_of(level_), threads_);
}

void CpuBackend::copy_from_host(const void* host, Tensor tensor) {
  check(tensor.is_contiguous(), "copy_from_host: {} has gaps between its rows", tensor.describe());
  if (tensor.bytes() > 0) std::memcpy(tensor.data, host, static_cast<std::size_t>(tensor.bytes()));
}

void CpuBackend::copy_to_host(Tensor tensor, void* host) {
  check(tensor.is_contiguous(), "copy_to_host: {} has gaps between its rows", tensor.describe());
  if (tensor.bytes() > 0) std::memcpy(host, tensor.data, static_cast<std::size_t>(tensor.bytes()));
}

void CpuBackend::do_fill_zero(Tensor x) {
  auto* const bytes = static_cast<std::byte*>(x.data);
  parallel_for(threads_, x.bytes(), 4 * kBlock, [&](index_t begin, index_t end) {
    std::memset(bytes + begin, 0, static_cast<std::size_t>(end - begin));
  });
}

void CpuBackend::do_copy(Tensor x, Tensor y) {
  if (x.is_contiguous() && y.is_contiguous()) {
    const auto* const from = static_cast<const std::byte*>(x.data);
    auto* const to = static_cast<std::byte*>(y.data);
    parallel_for(threads_, x.bytes(), 4 * kBlock, [&](index_t begin, index_t end) {
      std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin));
    });
    return;
  }
  for_each_row(x, y, [&](const std::byte* from, std::byte* to, index_t columns) {
    std::memcpy(to, from, static_cast<std::size_t>(columns * size_of(x.dtype)));
  });
}

void CpuBackend::do_cast(Tensor x, Tensor y) {
  if (x.dtype == y.dtype) return do_copy(x, y);
  dispatch(x.dtype, [&]<class From>() {
    dispatch(y.dtype, [&]<class To>() {
      const From* const from = x.as<From>();
      To* const to = y.as<To>();
      parallel_for(threads_, x.numel(), kBlock, [&](index_t begin, index_t end) {
#pragma omp simd
        for (index_t i = begin; i < end; ++i) store(to[i], static_cast<stat_t<From>>(from[i]));
      });
    });
  });
}

void CpuBackend::do_add(Tensor a, Tensor b, Tensor y) {
  dispatch(a.dtype, [&]<class T>() {
    const T *const pa = a.as<T>(), *const pb = b.as<T>();
    T* const py = y.as<T>();
    parallel_for(threads_, a.numel(), kBlock, [&](index_t begin, index_t end) {
#pragma omp simd
      for (index_t i = begin; i < end; ++i) {
        store(py[i], static_cast<stat_t<T>>(pa[i]) + static_cast<stat_t<T>>(pb[i]));
      }
    });
  });
}

void CpuBackend::do_scale(Tensor x, double factor) {
  dispatch(x.dtype, [&]<class T>() {
    T* const px = x.as<T>();
    const auto f = static_cast<stat_t<T>>(factor);
    parallel_for(threads_, x.numel(), kBlock, [&](index_t begin, index_t end) {
#pragma omp simd
      for (index_t i = begin; i < end; ++i) store(px[i], static_cast<stat_t<T>>(px[i]) * f);
    });
  });
}

}  // namespace regroup
