#include <bit>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/token_sort.h"

namespace regroup {
namespace {

// A block handles a chunk of tokens, a token a thread.
constexpr unsigned kChunk = 1024, kWarps = kChunk / kWarpThreads;
constexpr int kDigitBits = 8;
constexpr unsigned kDigits = 1U << kDigitBits;

// What the first pass reads, and the later ones.
struct FromIds {
  const std::int32_t* ids;
  index_t first_id, rows;
  __device__ SortedToken operator()(index_t n) const {
    const index_t row = ids[n] - first_id;
    return {static_cast<std::uint32_t>(row >= 0 && row < rows ? row : rows), static_cast<std::uint32_t>(n)};
  }
};
struct FromPass {
  const SortedToken* tokens;
  __device__ SortedToken operator()(index_t n) const { return tokens[n]; }
};

// counts[chunk, digit] = tokens of the chunk that have the digit.
template <class Source>
__global__ void __launch_bounds__(kChunk)
    count_kernel(Source source, index_t tokens, int shift, std::uint32_t* counts) {
  __shared__ std::uint32_t of_digit[kDigits];
  if (threadIdx.x < kDigits) of_digit[threadIdx.x] = 0;
  __syncthreads();
  const index_t n = index_t{blockIdx.x} * kChunk + threadIdx.x;
  if (n < tokens) atomicAdd(&of_digit[(source(n).row >> shift) % kDigits], 1U);
  __syncthreads();
  if (threadIdx.x < kDigits) counts[index_t{blockIdx.x} * kDigits + threadIdx.x] = of_digit[threadIdx.x];
}

// For digit threadIdx.x (below kDigits): where this block's first token with it goes, after all tokens with
// lower digits and those with it in the chunks before.
__device__ std::uint32_t first_position(const std::uint32_t* counts) {
  __shared__ std::uint32_t up_to[kDigits];
  const unsigned digit = threadIdx.x;
  std::uint32_t before = 0, total = 0;
  if (digit < kDigits) {
#pragma unroll 8
    for (unsigned chunk = 0; chunk < gridDim.x; ++chunk) {
      const std::uint32_t count = counts[index_t{chunk} * kDigits + digit];
      total += count;
      before += chunk < blockIdx.x ? count : 0;
    }
    up_to[digit] = total;
  }
  __syncthreads();
  for (unsigned step = 1; step < kDigits; step *= 2) {
    const std::uint32_t lower = digit < kDigits && digit >= step ? up_to[digit - step] : 0;
    __syncthreads();
    if (digit < kDigits) up_to[digit] += lower;
    __syncthreads();
  }
  return digit < kDigits ? up_to[digit] - total + before : 0;
}

// The lanes of this warp whose `digit` is this lane's; of lanes that are not `valid`, nothing useful.
__device__ unsigned lanes_alike(unsigned digit, bool valid) {
  unsigned alike = __ballot_sync(kWholeWarp, valid);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool set = (digit >> bit & 1U) != 0;
    const unsigned others = __ballot_sync(kWholeWarp, set);
    alike &= set ? others : ~others;
  }
  return alike;
}

template <class Source>
__global__ void __launch_bounds__(kChunk) scatter_kernel(Source source, index_t tokens, int shift,
                                                         const std::uint32_t* counts, SortedToken* result) {
  __shared__ std::uint32_t next[kWarps][kDigits];  // where a warp's first token with a digit goes
  const unsigned lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const index_t n = index_t{blockIdx.x} * kChunk + threadIdx.x;
  const bool valid = n < tokens;
  const SortedToken token = valid ? source(n) : SortedToken{0, 0};
  const unsigned digit = (token.row >> shift) % kDigits;
  const std::uint32_t position = first_position(counts);
  for (unsigned i = threadIdx.x; i < kWarps * kDigits; i += kChunk) next[i / kDigits][i % kDigits] = 0;
  __syncthreads();
  const unsigned alike = lanes_alike(digit, valid);
  const auto rank = static_cast<std::uint32_t>(__popc(alike & ((1U << lane) - 1)));
  if (valid && rank == 0) next[warp][digit] = static_cast<std::uint32_t>(__popc(alike));
  __syncthreads();
  if (threadIdx.x < kDigits) {
    std::uint32_t running = position;
    for (unsigned w = 0; w < kWarps; ++w) {
      const std::uint32_t count = next[w][threadIdx.x];
      next[w][threadIdx.x] = running;
      running += count;
    }
  }
  __syncthreads();
  if (valid) result[next[warp][digit] + rank] = token;
}

index_t chunks_of(index_t tokens) { return (tokens + kChunk - 1) / kChunk; }

template <class Source>
void sort_pass(CudaDevice& device, const Source& source, index_t tokens, int shift, std::uint32_t* counts,
               SortedToken* result) {
  const Grid grid{.blocks = block_count(tokens, kChunk), .threads = kChunk};
  launch(device, grid, count_kernel<Source>, source, tokens, shift, counts);
  launch(device, grid, scatter_kernel<Source>, source, tokens, shift, counts, result);
}

}  // namespace

index_t token_sort_bytes(index_t tokens) {
  return 2 * tokens * static_cast<index_t>(sizeof(SortedToken)) +
         chunks_of(tokens) * static_cast<index_t>(kDigits * sizeof(std::uint32_t));
}

const SortedToken* sort_tokens(CudaDevice& device, const std::int32_t* ids, index_t tokens, index_t first_id,
                               index_t rows, std::byte* scratch) {
  check(tokens == narrow<std::int32_t>(tokens) && rows == narrow<std::int32_t>(rows),
        "{} tokens of {} ids are too many to sort", tokens, rows);
  auto* from = reinterpret_cast<SortedToken*>(scratch);
  SortedToken* to = from + tokens;
  auto* const counts = reinterpret_cast<std::uint32_t*>(to + tokens);
  sort_pass(device, FromIds{ids, first_id, rows}, tokens, 0, counts, from);
  const int bits = std::bit_width(static_cast<std::uint64_t>(rows));  // `rows` is a key too
  for (int shift = kDigitBits; shift < bits; shift += kDigitBits) {
    sort_pass(device, FromPass{from}, tokens, shift, counts, to);
    std::swap(from, to);
  }
  return from;
}

}  // namespace regroup
