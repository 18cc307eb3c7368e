// Products: oneDNN's, in float32 where the processor does not multiply bfloat16.
#include <cstddef>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/onednn_matmul.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"

namespace regroup {
namespace {

// y = x in y's type, for matrices whose rows may be strided.
template <class From, class To>
void convert(int threads, const Tensor& x, const Tensor& y) {
  const From* const from = x.as<From>();
  To* const to = y.as<To>();
  parallel_for(threads, x[0], rows_per_block(x[0], x[1]), [&](index_t begin, index_t end) {
    for (index_t r = begin; r < end; ++r) {
      const From* const row = from + r * x.stride[0];
      To* const out = to + r * y.stride[0];
#pragma omp simd
      for (index_t i = 0; i < x[1]; ++i) store(out[i], static_cast<float>(row[i]));
    }
  });
}

}  // namespace

void CpuBackend::do_matmul(Tensor a, Tensor b, Tensor c, MatmulOptions options) {
  if (a.dtype != DType::kBFloat16 || multiplies_bfloat16_) {
    (*matmul_)(a, b, c, options);
    return;
  }
  // bfloat16 times bfloat16 is exact in float32, so this gives what hardware does but for the order of sums.
  const bool narrow_result = c.dtype == DType::kBFloat16;
  auto* memory = reinterpret_cast<float*>(
      workspace((a.numel() + b.numel() + (narrow_result ? c.numel() : 0)) * size_of(DType::kFloat32)));
  const auto take = [&memory](const Tensor& like) {
    const Tensor wide(memory, DType::kFloat32, {like[0], like[1]});
    memory += like.numel();
    return wide;
  };
  const Tensor wide_a = take(a), wide_b = take(b), wide_c = narrow_result ? take(c) : c;
  convert<bfloat16, float>(threads_, a, wide_a);
  convert<bfloat16, float>(threads_, b, wide_b);
  if (narrow_result && options.accumulate) convert<bfloat16, float>(threads_, c, wide_c);
  (*matmul_)(wide_a, wide_b, wide_c, options);
  if (narrow_result) convert<float, bfloat16>(threads_, wide_c, c);
}

}  // namespace regroup
