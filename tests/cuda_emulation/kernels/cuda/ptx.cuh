// Twin of the header of this name for the emulation: the same functions, by what the PTX ISA says they do.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/dtype.h"
#include "tests/cuda_emulation/machine.h"

namespace regroup::ptx {

// Element `half` (0: the lower bits) of a register of two bfloat16.
inline float bf16_of(std::uint32_t pair, int half) {
  return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xFFFF0000U);
}

// Products of bfloat16 are exact in float; a Tensor Core's order of the sum is its own.
inline void mma_bf16_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  struct Slot {
    float* d;
    const std::uint32_t *a, *b;
  };
  Slot mine{d, a, b};
  emulation::collective("mma", mine, [](const emulation::Slots<Slot>& lanes) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      check(lanes[l] != nullptr, "mma by a warp that the block does not fill");
      const int g = l / 4, t = l % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          left[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = bf16_of(lanes[l]->a[i], half);
        for (int i = 0; i < 2; ++i) right[2 * t + i * 8 + half][g] = bf16_of(lanes[l]->b[i], half);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lanes[l]->d[i] += sum;
      }
    }
  });
}

// `transposed`: lane l receives elements (2 (l % 4).., l / 4) of each matrix.
inline void load_matrices(const char* what, std::uint32_t (&registers)[4], const void* row, bool transposed) {
  struct Slot {
    std::uint32_t* registers;
    const void* row;
  };
  Slot mine{registers, row};
  emulation::collective(what, mine, [transposed](const emulation::Slots<Slot>& lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) {
        check(lanes[8 * matrix + r] != nullptr, "ldmatrix by a warp that the block does not fill");
        const void* address = lanes[8 * matrix + r]->row;
        check(reinterpret_cast<std::uintptr_t>(address) % 16 == 0, "ldmatrix of a row that is not aligned");
        std::memcpy(elements[r], address, sizeof elements[r]);
      }
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = 2 * (l % 4);
        const std::uint32_t low = transposed ? elements[t][g] : elements[g][t];
        const std::uint32_t high = transposed ? elements[t + 1][g] : elements[g][t + 1];
        lanes[l]->registers[matrix] = low | high << 16;
      }
    }
  });
}
inline void ldmatrix_x4(std::uint32_t (&registers)[4], const void* row) {
  load_matrices("ldmatrix", registers, row, false);
}
inline void ldmatrix_x4_transposed(std::uint32_t (&registers)[4], const void* row) {
  load_matrices("ldmatrix.trans", registers, row, true);
}

inline std::uint32_t pack_bf16(float low, float high) {
  return bfloat16(low).bits | std::uint32_t{bfloat16(high).bits} << 16;
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0F : y;
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  for (const void* address : {static_cast<const void*>(shared), global}) {
    check(reinterpret_cast<std::uintptr_t>(address) % 16 == 0, "cp.async of an address that is not aligned");
  }
  emulation::copy_later(shared, global, 16, valid);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int pending>
void cp_async_wait() {
  emulation::wait_for_copies(pending);
}

inline void* align_shared_1024(void* shared) {
  return static_cast<char*>(shared) + (-reinterpret_cast<std::uintptr_t>(shared) & 1023);
}
inline void fence_for_wgmma() {}
inline void pin(float (&)[8][4]) {}
inline void pin(std::uint32_t (&)[4]) {}
inline void wgmma_begin() {}
inline void wgmma_end() {}

// PTX ISA, "Matrix descriptor" and "Swizzling modes": the bytes of a tile by the canonical layouts of
// 128-byte swizzling, then bits 4 to 6 of the address exclusive or bits 7 to 9.
inline float swizzled_element(const void* tile, int row, int column) {
  constexpr std::uintptr_t kGroup = 1024;  // bytes between groups of 8 rows
  const auto r = static_cast<std::uintptr_t>(row), c = static_cast<std::uintptr_t>(column);
  const std::uintptr_t place = reinterpret_cast<std::uintptr_t>(tile) + r / 8 * kGroup + r % 8 * 128 + c * 2;
  bfloat16 value;
  std::memcpy(&value, reinterpret_cast<const void*>(place ^ (place >> 7 & 7) << 4), sizeof value);
  return static_cast<float>(value);
}

// One lane's part in a product of a warpgroup. `a`: a tile, or a lane's registers.
struct WgmmaOperands {
  float (*d)[4];
  const void* a_tile;
  const std::uint32_t* a;
  const void* b;
  bool accumulate, b_transposed;
  int first_row;  // the warp's, of a_tile
};

inline void check_tile(const void* tile) {
  const auto address = reinterpret_cast<std::uintptr_t>(tile);
  check(address % 16 == 0 && (address & 0x380) == 0, "wgmma of a tile that is not aligned to 1024 bytes");
}

// Done at once, each warp for itself.
inline void wgmma(WgmmaOperands mine) {
  mine.first_row = emulation::warp() % 4 * 16;
  emulation::collective("wgmma", mine, [](const emulation::Slots<WgmmaOperands>& lanes) {
    float left[16][16], right[16][64];
    for (int l = 0; l < 32; ++l) {
      check(lanes[l] != nullptr && lanes[l]->a_tile == lanes[0]->a_tile && lanes[l]->b == lanes[0]->b &&
                lanes[l]->accumulate == lanes[0]->accumulate,
            "wgmma by lanes that do not agree");
      for (int half = 0; half < 2 && lanes[l]->a != nullptr; ++half) {
        for (int i = 0; i < 4; ++i) {
          left[l / 4 + i % 2 * 8][2 * (l % 4) + i / 2 * 8 + half] = bf16_of(lanes[l]->a[i], half);
        }
      }
    }
    const WgmmaOperands& x = *lanes[0];
    check_tile(x.b);
    if (x.a_tile != nullptr) {
      check_tile(x.a_tile);
      for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) left[m][k] = swizzled_element(x.a_tile, x.first_row + m, k);
      }
    }
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 64; ++n) {
        right[k][n] = x.b_transposed ? swizzled_element(x.b, n, k) : swizzled_element(x.b, k, n);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int n = 0; n < 8; ++n) {
        for (int i = 0; i < 4; ++i) {
          const int row = l / 4 + i / 2 * 8, column = 8 * n + 2 * (l % 4) + i % 2;
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
          lanes[l]->d[n][i] = sum + (lanes[l]->accumulate ? lanes[l]->d[n][i] : 0.0F);
        }
      }
    }
  });
}
inline void wgmma_m64n64k16(float (&d)[8][4], const void* a, const void* b, bool accumulate) {
  wgmma({.d = d,
         .a_tile = a,
         .a = nullptr,
         .b = b,
         .accumulate = accumulate,
         .b_transposed = true,
         .first_row = 0});
}
inline void wgmma_m64n64k16(float (&d)[8][4], const std::uint32_t (&a)[4], const void* b) {
  wgmma(
      {.d = d, .a_tile = nullptr, .a = a, .b = b, .accumulate = true, .b_transposed = false, .first_row = 0});
}

}  // namespace regroup::ptx
