#include <cmath>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/slot_tiles.cuh"

namespace regroup {
namespace {

// A tile of a factored slot: 64 threads side by side, 4 neighbouring or equally spaced columns each, in 4
// groups that take every 4th row.
constexpr index_t kTileRows = 128, kTileColumns = 256;
constexpr int kAbreast = 64, kGroups = kTileThreads / kAbreast, kColumnsOfThread = kTileColumns / kAbreast;
constexpr int kWarpsAbreast = kAbreast / kWarpThreads;
static_assert(kTileColumns == kTileThreads && kTileRows <= kTileThreads);

// An AdafactorSlot on the device.
struct Entry {
  void* weight;
  const void* gradient;
  void *row, *column, *second_moment;  // second_moment null: factored
  double *row_sums, *column_sums, *totals;
  index_t rows, columns, global_rows, global_columns;
  index_t packs = 0;                        // 1: 16-byte accesses are possible
  index_t first_tile = 0, tiles = 0;        // among those of all slots
  index_t row_tiles = 0, column_tiles = 0;  // factored: tiles = row_tiles column_tiles
  index_t first_line_block = 0;             // factored: blocks of kTileThreads lines, rows then columns
  index_t row_partials = 0,
          column_partials = 0;  // where [column_tiles, rows] and [row_tiles, columns] sums begin
};

struct Entries {
  const Entry* at;
  index_t slots, tiles, line_blocks;
  double2* of_tile;  // [tiles]: each tile's sums
  double* partials;  // each tile's sums of rows and columns
};

// Where this thread is in a tile.
template <int N>
struct Place {
  static constexpr int kPacks = kColumnsOfThread / N;
  index_t row_tile, column_tile;
  int group, abreast;

  __device__ Place(const Entry& slot, index_t tile)
      : row_tile(quotient(tile, slot.column_tiles)),
        column_tile(tile - row_tile * slot.column_tiles),
        group(static_cast<int>(threadIdx.x) / kAbreast),
        abreast(static_cast<int>(threadIdx.x) % kAbreast) {}

  // Of this thread's pack number p, within the tile.
  __device__ int local_column(int p) const { return (p * kAbreast + abreast) * N; }
  __device__ index_t column(int p) const { return column_tile * kTileColumns + local_column(p); }

  // Calls body(row of the tile, row) for the rows of this thread's group; the same rows in all of a warp.
  template <class Body>
  __device__ void for_each_row(index_t rows, Body body) const {
    const index_t first = row_tile * kTileRows, left = rows - first;
    const int end = static_cast<int>(left < kTileRows ? left : kTileRows);
#pragma unroll 4
    for (int r = group; r < end; r += kGroups) body(r, first + r);
  }
};

// Pass 1 over a tile: its sums of rows, of columns, of w^2 and of g^2.
template <int N, class S>
__device__ double2 factored_statistics(const Entry& slot, index_t tile, double* partials) {
  __shared__ S of_row[kTileRows][kWarpsAbreast], of_column[kGroups][kTileColumns];
  const Place<N> place(slot, tile);
  const auto* const w = static_cast<const S*>(slot.weight);
  const auto* const g = static_cast<const S*>(slot.gradient);
  S columns[Place<N>::kPacks][N] = {}, weights = 0;
  place.for_each_row(slot.rows, [&](int local, index_t row) {
    S sum = 0;
#pragma unroll
    for (int p = 0; p < Place<N>::kPacks; ++p) {
      if (place.column(p) >= slot.columns) continue;
      S x[N], y[N];
      load_values(w + row * slot.columns + place.column(p), x);
      load_values(g + row * slot.columns + place.column(p), y);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        weights += x[j] * x[j];
        columns[p][j] += y[j] * y[j];
        sum += y[j] * y[j];
      }
    }
    sum = warp_sum(sum);
    if (place.abreast % kWarpThreads == 0) of_row[local][place.abreast / kWarpThreads] = sum;
  });
#pragma unroll
  for (int p = 0; p < Place<N>::kPacks; ++p) {
#pragma unroll
    for (int j = 0; j < N; ++j) of_column[place.group][place.local_column(p) + j] = columns[p][j];
  }
  __syncthreads();
  const index_t own = threadIdx.x;  // row and column of the tile that this thread adds up
  const index_t row = place.row_tile * kTileRows + own, column = place.column_tile * kTileColumns + own;
  if (own < kTileRows && row < slot.rows) {
    double sum = 0;
    for (int i = 0; i < kWarpsAbreast; ++i) sum += static_cast<double>(of_row[own][i]);
    partials[slot.row_partials + place.column_tile * slot.rows + row] = sum;
  }
  double sum = 0;
  if (column < slot.columns) {
    for (int i = 0; i < kGroups; ++i) sum += static_cast<double>(of_column[i][own]);
    partials[slot.column_partials + place.row_tile * slot.columns + column] = sum;
  }
  return double2{block_sum(static_cast<double>(weights)), block_sum(sum)};
}

// Pass 2 over a tile: the sum of g^2 / (row column).
template <int N, class S>
__device__ double factored_moments(const Entry& slot, index_t tile) {
  __shared__ double inverse_row[kTileRows];
  const Place<N> place(slot, tile);
  const auto* const g = static_cast<const S*>(slot.gradient);
  const index_t own = place.row_tile * kTileRows + threadIdx.x;
  if (threadIdx.x < kTileRows && own < slot.rows) {
    inverse_row[threadIdx.x] = 1.0 / static_cast<double>(static_cast<const S*>(slot.row)[own]);
  }
  S inverse_column[Place<N>::kPacks][N] = {};
#pragma unroll
  for (int p = 0; p < Place<N>::kPacks; ++p) {
    if (place.column(p) >= slot.columns) continue;
    load_values(static_cast<const S*>(slot.column) + place.column(p), inverse_column[p]);
#pragma unroll
    for (int j = 0; j < N; ++j) inverse_column[p][j] = S{1} / inverse_column[p][j];
  }
  __syncthreads();
  double total = 0;
  place.for_each_row(slot.rows, [&](int local, index_t row) {
    S sum = 0;
#pragma unroll
    for (int p = 0; p < Place<N>::kPacks; ++p) {
      if (place.column(p) >= slot.columns) continue;
      S y[N];
      load_values(g + row * slot.columns + place.column(p), y);
      // The square first: a factor that holds 1 / (row column) would not fit.
#pragma unroll
      for (int j = 0; j < N; ++j) sum += y[j] * y[j] * inverse_column[p][j];
    }
    total += static_cast<double>(sum) * inverse_row[local];
  });
  return block_sum(total);
}

// Pass 2 over a flat tile: the new second moment v, and the sum of g^2 / v.
template <int N, class S>
__device__ double full_moments(const Entry& slot, index_t tile, const AdafactorOptions& options) {
  auto* const v = static_cast<S*>(slot.second_moment);
  const auto* const g = static_cast<const S*>(slot.gradient);
  const S beta2 = static_cast<S>(options.beta2), rest = static_cast<S>(1 - options.beta2);
  const S epsilon = static_cast<S>(options.epsilon_gradient);
  S sum = 0;
  for_flat_tile<N>(tile, slot.rows * slot.columns, [&](auto pack, index_t i) {
    S moment[pack()], gradient[pack()];
    load_values(v + i, moment);
    load_values(g + i, gradient);
#pragma unroll
    for (int j = 0; j < pack(); ++j) {
      const S square = gradient[j] * gradient[j];
      moment[j] = beta2 * moment[j] + rest * (square + epsilon);
      sum += square / moment[j];
    }
    store_values(v + i, moment);
  });
  return block_sum(static_cast<double>(sum));
}

// What adafactor_update() multiplies u by, and m.
struct Factor {
  double factor, mean_row;
};
__device__ Factor factor_of(const Entry& slot, const AdafactorOptions& options) {
  const double* const totals = slot.totals;
  const auto rows = static_cast<double>(slot.global_rows);
  const double size = rows * static_cast<double>(slot.global_columns);
  const double mean_row = slot.second_moment != nullptr ? 1.0 : totals[3] / rows;
  const double rms_update = std::sqrt(mean_row * totals[2] / size);
  return {options.learning_rate * std::fmax(options.epsilon_parameter, std::sqrt(totals[0] / size)) /
              std::fmax(1.0, rms_update / options.clipping_threshold),
          mean_row};
}

// Pass 3 over a tile: w -= scale of the row g / root(column).
template <int N, class S>
__device__ void factored_update(const Entry& slot, index_t tile, const AdafactorOptions& options) {
  __shared__ S scale[kTileRows];
  const Place<N> place(slot, tile);
  auto* const w = static_cast<S*>(slot.weight);
  const auto* const g = static_cast<const S*>(slot.gradient);
  const index_t own = place.row_tile * kTileRows + threadIdx.x;
  if (threadIdx.x < kTileRows && own < slot.rows) {
    const Factor factor = factor_of(slot, options);
    const auto row = static_cast<double>(static_cast<const S*>(slot.row)[own]);
    scale[threadIdx.x] = static_cast<S>(factor.factor * std::sqrt(factor.mean_row / row));
  }
  S inverse_root[Place<N>::kPacks][N] = {};
#pragma unroll
  for (int p = 0; p < Place<N>::kPacks; ++p) {
    if (place.column(p) >= slot.columns) continue;
    load_values(static_cast<const S*>(slot.column) + place.column(p), inverse_root[p]);
#pragma unroll
    for (int j = 0; j < N; ++j) inverse_root[p][j] = S{1} / std::sqrt(inverse_root[p][j]);
  }
  __syncthreads();
  place.for_each_row(slot.rows, [&](int local, index_t row) {
#pragma unroll
    for (int p = 0; p < Place<N>::kPacks; ++p) {
      if (place.column(p) >= slot.columns) continue;
      const index_t at = row * slot.columns + place.column(p);
      S x[N], y[N];
      load_values(w + at, x);
      load_values(g + at, y);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] -= scale[local] * (y[j] * inverse_root[p][j]);
      store_values(w + at, x);
    }
  });
}

template <int N, class S>
__device__ void full_update(const Entry& slot, index_t tile, const AdafactorOptions& options) {
  __shared__ S factor;
  if (threadIdx.x == 0) factor = static_cast<S>(factor_of(slot, options).factor);
  __syncthreads();
  auto* const w = static_cast<S*>(slot.weight);
  const auto* const g = static_cast<const S*>(slot.gradient);
  const auto* const v = static_cast<const S*>(slot.second_moment);
  const S scale = factor;
  for_flat_tile<N>(tile, slot.rows * slot.columns, [&](auto pack, index_t i) {
    S weight[pack()], gradient[pack()], moment[pack()];
    load_values(w + i, weight);
    load_values(g + i, gradient);
    load_values(v + i, moment);
#pragma unroll
    for (int j = 0; j < pack(); ++j) weight[j] -= scale * (gradient[j] / std::sqrt(moment[j]));
    store_values(w + i, weight);
  });
}

// ---- Kernels over tiles: pass 1, 2 and 3

// Calls body(pack, slot, tile of the slot) for this block's tile.
template <class S, class Body>
__device__ void with_tile(const Entries& entries, Body body) {
  const index_t tile = blockIdx.x;
  const Entry& slot = entries.at[find_slot<&Entry::first_tile>(entries.at, entries.slots, tile)];
  if (slot.packs != 0) {
    body(std::integral_constant<int, kPackSize<S>>(), slot, tile - slot.first_tile);
  } else {
    body(std::integral_constant<int, 1>(), slot, tile - slot.first_tile);
  }
}

template <class S>
__global__ void statistics_kernel(Entries entries) {
  with_tile<S>(entries, [&](auto pack, const Entry& slot, index_t tile) {
    const double2 sum =
        slot.second_moment != nullptr
            ? flat_squares<pack()>(static_cast<const S*>(slot.weight), static_cast<const S*>(slot.gradient),
                                   tile, slot.rows * slot.columns)
            : factored_statistics<pack(), S>(slot, tile, entries.partials);
    if (threadIdx.x == 0) entries.of_tile[blockIdx.x] = sum;
  });
}

template <class S>
__global__ void moments_kernel(Entries entries, AdafactorOptions options) {
  with_tile<S>(entries, [&](auto pack, const Entry& slot, index_t tile) {
    const double sum = slot.second_moment != nullptr ? full_moments<pack(), S>(slot, tile, options)
                                                     : factored_moments<pack(), S>(slot, tile);
    if (threadIdx.x == 0) entries.of_tile[blockIdx.x] = double2{sum, 0};
  });
}

template <class S>
__global__ void update_kernel(Entries entries, AdafactorOptions options) {
  with_tile<S>(entries, [&](auto pack, const Entry& slot, index_t tile) {
    if (slot.second_moment != nullptr) {
      full_update<pack(), S>(slot, tile, options);
    } else {
      factored_update<pack(), S>(slot, tile, options);
    }
  });
}

// ---- Kernels over lines, the rows and columns of factored slots, and over slots

// The slot and the line of this thread; a line >= rows + columns is none.
__device__ inline index_t find_line(const Entries& entries, index_t block, const Entry*& slot) {
  slot = entries.at + find_slot<&Entry::first_line_block>(entries.at, entries.slots, block);
  return (block - slot->first_line_block) * kTileThreads + threadIdx.x;
}

// row_sums, column_sums and, in the last blocks, totals[0] and [1], from the tiles' sums.
__global__ void add_statistics_kernel(Entries entries, double epsilon) {
  if (blockIdx.x >= entries.line_blocks) {
    const Entry& slot = entries.at[blockIdx.x - entries.line_blocks];
    const double2 sum = sum_tiles(entries.of_tile + slot.first_tile, slot.tiles);
    if (threadIdx.x == 0) {
      slot.totals[0] = sum.x;
      slot.totals[1] = sum.y;
    }
    return;
  }
  const Entry* slot = nullptr;
  const index_t line = find_line(entries, blockIdx.x, slot), column = line - slot->rows;
  const bool is_row = line < slot->rows;
  if (column >= slot->columns) return;
  const double* const from =
      entries.partials + (is_row ? slot->row_partials + line : slot->column_partials + column);
  const index_t count = is_row ? slot->column_tiles : slot->row_tiles;
  const index_t stride = is_row ? slot->rows : slot->columns;
  double sum = static_cast<double>(is_row ? slot->columns : slot->rows) * epsilon;
#pragma unroll 8
  for (index_t i = 0; i < count; ++i) sum += from[i * stride];
  (is_row ? slot->row_sums[line] : slot->column_sums[column]) = sum;
}

template <class S>
__global__ void decay_lines_kernel(Entries entries, double beta2) {
  const Entry* slot = nullptr;
  const index_t line = find_line(entries, blockIdx.x, slot), column = line - slot->rows;
  const bool is_row = line < slot->rows;
  if (column >= slot->columns) return;
  S& moment = is_row ? static_cast<S*>(slot->row)[line] : static_cast<S*>(slot->column)[column];
  const double sum = is_row ? slot->row_sums[line] : slot->column_sums[column];
  const auto terms = static_cast<double>(is_row ? slot->global_columns : slot->global_rows);
  moment = static_cast<S>(beta2 * static_cast<double>(moment) + (1 - beta2) * sum / terms);
}

// totals[2] and [3]; a block a slot.
template <class S>
__global__ void add_moments_kernel(Entries entries) {
  const Entry& slot = entries.at[blockIdx.x];
  const double2 sum = sum_tiles(entries.of_tile + slot.first_tile, slot.tiles);
  double row = 0;
  if (slot.second_moment == nullptr) {
#pragma unroll 4
    for (index_t r = threadIdx.x; r < slot.rows; r += kTileThreads) {
      row += static_cast<double>(static_cast<const S*>(slot.row)[r]);
    }
  }
  row = block_sum(row);
  if (threadIdx.x != 0) return;
  slot.totals[2] = sum.x;
  slot.totals[3] = row;
}

// ---- On the host

// A count of blocks or numbers that grows slot by slot.
index_t take(index_t& total, index_t count) { return std::exchange(total, total + count); }

Entry describe(const AdafactorSlot& slot) {
  const index_t rows = slot.weight[0], columns = slot.weight[1];
  Entry entry{.weight = slot.weight.data,
              .gradient = slot.gradient.data,
              .row = slot.row.data,
              .column = slot.column.data,
              .second_moment = slot.second_moment.data,
              .row_sums = static_cast<double*>(slot.row_sums.data),
              .column_sums = static_cast<double*>(slot.column_sums.data),
              .totals = slot.totals.as<double>(),
              .rows = rows,
              .columns = columns,
              .global_rows = slot.global_rows,
              .global_columns = slot.global_columns};
  if (slot.second_moment) {
    entry.packs = aligned({slot.weight.data, slot.gradient.data, slot.second_moment.data});
    entry.tiles = (rows * columns + kFlatTile - 1) / kFlatTile;
  } else {
    entry.packs = columns % (16 / size_of(slot.weight.dtype)) == 0 &&
                  aligned({slot.weight.data, slot.gradient.data, slot.column.data});
    entry.row_tiles = (rows + kTileRows - 1) / kTileRows;
    entry.column_tiles = (columns + kTileColumns - 1) / kTileColumns;
    entry.tiles = entry.row_tiles * entry.column_tiles;
  }
  return entry;
}

Entries upload(CudaDevice& device, SlotTable& table, std::span<const AdafactorSlot> slots) {
  std::vector<Entry> entries;
  index_t tiles = 0, line_blocks = 0, partials = 0;
  for (const AdafactorSlot& slot : slots) {
    check(slot.weight.dtype == slots[0].weight.dtype, "Adafactor: slots of {} and {} in one call",
          slot.weight.describe(), slots[0].weight.describe());
    Entry entry = describe(slot);
    entry.first_tile = take(tiles, entry.tiles);
    const bool factored = !slot.second_moment;
    entry.first_line_block =
        take(line_blocks, factored ? block_count(entry.rows + entry.columns, kTileThreads) : 0);
    entry.row_partials = take(partials, entry.column_tiles * entry.rows);
    entry.column_partials = take(partials, entry.row_tiles * entry.columns);
    entries.push_back(entry);
  }
  const auto tile_bytes = tiles * static_cast<index_t>(sizeof(double2));
  std::byte* const memory = device.workspace(tile_bytes + partials * static_cast<index_t>(sizeof(double)));
  return {.at = table.update(device, entries),
          .slots = static_cast<index_t>(entries.size()),
          .tiles = tiles,
          .line_blocks = line_blocks,
          .of_tile = reinterpret_cast<double2*>(memory),
          .partials = reinterpret_cast<double*>(memory + tile_bytes)};
}

Grid blocks(index_t count) { return {.blocks = block_count(count, 1), .threads = kTileThreads}; }

}  // namespace

void CudaBackend::do_adafactor_statistics(std::span<const AdafactorSlot> slots,
                                          const AdafactorOptions& options) {
  if (slots.empty()) return;
  const Entries entries = upload(device_, adafactor_slots_, slots);
  dispatch(slots[0].weight.dtype,
           [&]<class T>() { launch(device_, blocks(entries.tiles), statistics_kernel<stat_t<T>>, entries); });
  launch(device_, blocks(entries.line_blocks + entries.slots), add_statistics_kernel, entries,
         options.epsilon_gradient);
}

void CudaBackend::do_adafactor_moments(std::span<const AdafactorSlot> slots,
                                       const AdafactorOptions& options) {
  if (slots.empty()) return;
  const Entries entries = upload(device_, adafactor_slots_, slots);
  dispatch(slots[0].weight.dtype, [&]<class T>() {
    using S = stat_t<T>;
    launch(device_, blocks(entries.line_blocks), decay_lines_kernel<S>, entries, options.beta2);
    launch(device_, blocks(entries.tiles), moments_kernel<S>, entries, options);
    launch(device_, blocks(entries.slots), add_moments_kernel<S>, entries);
  });
}

void CudaBackend::do_adafactor_update(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) {
  if (slots.empty()) return;
  const Entries entries = upload(device_, adafactor_slots_, slots);
  dispatch(slots[0].weight.dtype, [&]<class T>() {
    launch(device_, blocks(entries.tiles), update_kernel<stat_t<T>>, entries, options);
  });
}

}  // namespace regroup
