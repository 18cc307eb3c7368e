#include <cstring>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"

namespace regroup {

void CpuBackend::do_embedding(Tensor ids, Tensor table, index_t first_id, Tensor y) {
  const std::int32_t* const id = ids.as<std::int32_t>();
  const index_t rows = table[0];
  const auto row_bytes = static_cast<std::size_t>(table[1] * size_of(table.dtype));
  const auto* const from = static_cast<const std::byte*>(table.data);
  auto* const to = static_cast<std::byte*>(y.data);
  parallel_for(threads_, ids[0], rows_per_block(ids[0], table[1]), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      const index_t row = id[n] - first_id;
      std::byte* const out = to + static_cast<std::size_t>(n) * row_bytes;
      if (row >= 0 && row < rows) {
        std::memcpy(out, from + static_cast<std::size_t>(row) * row_bytes, row_bytes);
      } else {
        std::memset(out, 0, row_bytes);
      }
    }
  });
}

// A thread owns columns, so every element of the table is summed in the order of the tokens.
void CpuBackend::do_embedding_backward(Tensor ids, Tensor dy, index_t first_id, Tensor dtable) {
  constexpr index_t kColumns = 64;
  dispatch(dy.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const std::int32_t* const id = ids.as<std::int32_t>();
    const T* const gradient = dy.as<T>();
    S* const sums = dtable.as<S>();
    const index_t columns = dy[1], rows = dtable[0], tokens = dy[0];
    parallel_for(threads_, columns, kColumns, [&](index_t begin, index_t end) {
      for (index_t n = 0; n < tokens; ++n) {
        const index_t row = id[n] - first_id;
        if (row < 0 || row >= rows) continue;
        const T* const from = gradient + n * columns;
        S* const to = sums + row * columns;
#pragma omp simd
        for (index_t d = begin; d < end; ++d) to[d] += static_cast<S>(from[d]);
      }
    });
  });
}

}  // namespace regroup
