// The PTX instructions that have no C++ spelling. Fragment layouts: PTX ISA, "Warp-level matrix
// instructions".
#pragma once

#include <cstdint>

namespace regroup::ptx {

__device__ inline std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// d += a b: mma.sync.m16n8k16, a [16, 16] row-major, b [16, 8] column-major, both bfloat16; d [16, 8] float.
// Lane l holds, with g = l / 4 and t = l % 4:
//   a: {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, two elements a register;
//   b: {(2t.., g), (2t + 8.., g)};  d: {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
__device__ inline void mma_bf16_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 2-byte elements: lanes 8 i .. 8 i + 7 give the addresses (16-byte aligned, shared)
// of the rows of matrix i; lane l receives elements (l / 4, 2 (l % 4)..) of matrix i in registers[i].
__device__ inline void ldmatrix_x4(std::uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
__device__ inline void ldmatrix_x4_transposed(std::uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two bfloat16 in a register, `low` in the lower half; rounded to nearest even.
__device__ inline std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x to 2 ulp; 0 where the result is subnormal.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Copies 16 bytes to shared memory in the background; where not `valid`, zeros, and `global` is not read.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of copies begun since the last call.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's newest groups are unfinished.
template <int pending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- wgmma, of Hopper only (sm_90a): a warpgroup is four warps whose first is a multiple of four.

// The first address from `shared` on that is a multiple of 1024 in shared memory.
__device__ inline void* align_shared_1024(void* shared) {
  return static_cast<char*>(shared) + (-shared_address(shared) & 1023);
}

// What this thread has written to shared memory is seen by wgmma of all threads that it meets in a barrier
// after this.
__device__ inline void fence_for_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Neither read nor written by other instructions that the compiler would move across this place.
__device__ inline void pin(float (&d)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
__device__ inline void pin(std::uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// PTX ISA, "Matrix descriptor": address / 16; bytes / 16 between 64 columns (of no meaning here) and between
// groups of 8 rows; swizzling by 128 bytes.
__device__ inline std::uint64_t wgmma_descriptor(const void* tile) {
  return (shared_address(tile) & 0x3FFFF) >> 4 | std::uint64_t{1} << 16 | std::uint64_t{1024 >> 4} << 32 |
         std::uint64_t{1} << 62;
}

// Products of a warpgroup: wgmma.mma_async.m64n64k16. Each warp has 16 rows of d in the layout of
// mma_bf16_m16n8k16, d[n] being columns 8 n .. 8 n + 7. Tiles in shared memory have rows of 64 bfloat16 (128
// bytes) with chunk c of 16 bytes of row r at place c ^ (r % 8), row 0 at a multiple of 1024 bytes. Between
// wgmma_begin() and wgmma_end() nothing else may touch d, nor a where it is registers.

// d = a b^T (+ d where `accumulate`): element k of row m is at a[m][k], of row n at b[n][k]; `a` and `b` are
// one of the multiples of 16 of row 0 of 64 rows.
__device__ inline void wgmma_m64n64k16(float (&d)[8][4], const void* a, const void* b, bool accumulate) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0; }"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
        "+f"(d[7][2]), "+f"(d[7][3])
      : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "r"(accumulate ? 1 : 0)
      : "memory");
#else
  __trap();  // not chosen on other devices
#endif
}

// d += a b: each warp has its 16 rows of a in the layout of mma_bf16_m16n8k16; element n of row k is at
// b[k][n], `b` the beginning of one of the rows whose numbers 8 divides.
__device__ inline void wgmma_m64n64k16(float (&d)[8][4], const std::uint32_t (&a)[4], const void* b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
        "+f"(d[7][2]), "+f"(d[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_descriptor(b))
      : "memory");
#else
  __trap();
#endif
}
__device__ inline void wgmma_begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Waits for all that was begun.
__device__ inline void wgmma_end() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

}  // namespace regroup::ptx
