#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/token_sort.h"

namespace regroup {
namespace {

template <class T>
struct Gather {
  const std::int32_t* ids;
  const T* table;
  T* y;
  index_t first_id, rows, columns;

  template <int N>
  __device__ void apply(index_t i) const {
    const index_t n = quotient(i, columns), row = ids[n] - first_id;
    Pack<T, N> pack{};
    if (row >= 0 && row < rows) pack = load_pack<N>(table + row * columns + (i - n * columns));
    store_pack<N>(y + i, pack);
  }
};

// ---- Backward. Tokens are sorted by row, and the sorted tokens cut into segments of equal size, so that no
// row, however frequent, keeps one block busy. Within a segment, a run of tokens of one row is summed in
// their order; a run that lies in one segment is added to the table at once, the parts of the others in the
// order of the segments.

constexpr index_t kSegment = 32;
constexpr unsigned kThreads = 128;  // of a block, which handles a segment; a thread, N columns at a time
constexpr int kAhead = 8;           // tokens that are read before the first of them is added

template <class T>
struct Scatter {
  const SortedToken* sorted;
  const T* dy;
  stat_t<T>* dtable;
  // [segments, 2, columns]: the part of the run that comes from the segment before (0), and of the one that
  // begins here and goes on in the next (1).
  stat_t<T>* parts;
  index_t tokens, rows, columns;

  // An impossible row where there is no such token.
  __device__ std::uint32_t row_at(index_t position) const {
    return position >= 0 && position < tokens ? sorted[position].row : 0xFFFFFFFFU;
  }
};

template <int N, class T>
__global__ void segments_kernel(Scatter<T> op) {
  using S = stat_t<T>;
  __shared__ std::uint32_t row_of[kSegment + 2], token_of[kSegment];  // rows with a neighbour on both sides
  const index_t begin = index_t{blockIdx.x} * kSegment;
  const int count = static_cast<int>(op.tokens < begin + kSegment ? op.tokens - begin : kSegment);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count + 2) row_of[thread] = op.row_at(begin + thread - 1);
  if (thread < count) token_of[thread] = op.sorted[begin + thread].token;
  __syncthreads();
  for (index_t d = index_t{threadIdx.x} * N; d < op.columns; d += index_t{kThreads} * N) {
    S sum[N] = {};
    bool from_before = row_of[0] == row_of[1];
    for (int first = 0; first < count; first += kAhead) {
      Pack<T, N> packs[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < count && row_of[first + i + 1] < op.rows) {
          packs[i] = load_pack<N>(op.dy + index_t{token_of[first + i]} * op.columns + d);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = first + i;
        if (at >= count || row_of[at + 1] >= op.rows) break;
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += widen(packs[i].at[j]);
        const bool same_after = row_of[at + 1] == row_of[at + 2];
        if (same_after && at + 1 < count) continue;
        if (from_before || same_after) {
          store_values(op.parts + (2 * index_t{blockIdx.x} + (from_before ? 0 : 1)) * op.columns + d, sum);
        } else {
          S* const to = op.dtable + index_t{row_of[at + 1]} * op.columns + d;
          S old[N];
          load_values(to, old);
#pragma unroll
          for (int j = 0; j < N; ++j) old[j] += sum[j];
          store_values(to, old);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = 0;
        from_before = false;
      }
    }
  }
}

// Adds up the parts of the run that begins in a segment and goes on in the next: warp w those of segments w,
// w + 8, ... of the run, then the warps' sums in their order.
template <int N, class T>
__global__ void parts_kernel(Scatter<T> op) {
  using S = stat_t<T>;
  constexpr int kWarps = 8;
  __shared__ S of_warp[kWarps][kWarpThreads * N];
  const index_t segment = blockIdx.x, begin = segment * kSegment, end = begin + kSegment;
  const std::uint32_t row = op.row_at(end - 1);
  if (row >= op.rows || row != op.row_at(end)) return;
  if (row == op.row_at(begin) && row == op.row_at(begin - 1)) return;  // begun earlier
  // The first segment after `segment` that does not begin with this row.
  index_t last = segment + 1, beyond = (op.tokens + kSegment - 1) / kSegment;
  while (last < beyond) {
    const index_t middle = (last + beyond) / 2;
    if (op.row_at(middle * kSegment) == row) {
      last = middle + 1;
    } else {
      beyond = middle;
    }
  }
  const unsigned lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  for (index_t first = 0; first < op.columns; first += kWarpThreads * N) {
    const index_t d = first + lane * N;
    S sum[N] = {};
    if (d < op.columns) {
#pragma unroll 4
      for (index_t s = segment + warp; s < beyond; s += kWarps) {
        S part[N];
        load_values(op.parts + (2 * s + (s == segment ? 1 : 0)) * op.columns + d, part);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += part[j];
      }
    }
    for (int j = 0; j < N; ++j) of_warp[warp][lane * N + j] = sum[j];
    __syncthreads();
    for (index_t c = threadIdx.x; c < kWarpThreads * N && first + c < op.columns; c += blockDim.x) {
      S total = 0;
      for (int w = 0; w < kWarps; ++w) total += of_warp[w][c];
      op.dtable[index_t{row} * op.columns + first + c] += total;
    }
    __syncthreads();
  }
}

}  // namespace

void CudaBackend::do_embedding(Tensor ids, Tensor table, index_t first_id, Tensor y) {
  dispatch(table.dtype, [&]<class T>() {
    const Gather<T> op{.ids = ids.as<std::int32_t>(),
                       .table = table.as<T>(),
                       .y = y.as<T>(),
                       .first_id = first_id,
                       .rows = table[0],
                       .columns = table[1]};
    map<kPackSize<T>>(device_, op, y.numel(), in_packs<kPackSize<T>>(table[1], {table.data, y.data}));
  });
}

void CudaBackend::do_embedding_backward(Tensor ids, Tensor dy, index_t first_id, Tensor dtable) {
  dispatch(dy.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t tokens = dy[0], columns = dy[1], segments = (tokens + kSegment - 1) / kSegment;
    const index_t parts_bytes = 2 * segments * columns * static_cast<index_t>(sizeof(S));
    std::byte* const memory = device_.workspace(parts_bytes + token_sort_bytes(tokens));
    const Scatter<T> op{.sorted = sort_tokens(device_, ids.as<std::int32_t>(), tokens, first_id, dtable[0],
                                              memory + parts_bytes),
                        .dy = dy.as<T>(),
                        .dtable = dtable.as<S>(),
                        .parts = reinterpret_cast<S*>(memory),
                        .tokens = tokens,
                        .rows = dtable[0],
                        .columns = columns};
    const bool by_packs = in_packs<kPackSize<T>>(columns, {dy.data, dtable.data});
    launch(device_, {.blocks = block_count(segments, 1), .threads = kThreads},
           by_packs ? segments_kernel<kPackSize<T>, T> : segments_kernel<1, T>, op);
    launch(device_, {.blocks = block_count(segments, 1), .threads = 256},
           by_packs ? parts_kernel<kPackSize<T>, T> : parts_kernel<1, T>, op);
  });
}

}  // namespace regroup
