#include <cmath>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/slot_tiles.cuh"

namespace regroup {
namespace {

// An AdamWSlot on the device.
struct Entry {
  void* weight;
  const void* gradient;
  void *first_moment, *second_moment;
  double* totals;
  index_t size, global_size;
  index_t decays;             // 0 or 1
  index_t packs;              // 1: 16-byte accesses are possible
  index_t first_tile, tiles;  // among those of all slots
};

struct Entries {
  const Entry* at;
  index_t slots, tiles;
};

// What is the same for all slots.
struct Step {
  double learning_rate, bias1, bias2;  // the corrections 1 / (1 - beta^step)
  double beta1, beta2, epsilon, weight_decay, epsilon_parameter;
  bool scale_by_rms;
};

template <class S>
__global__ void statistics_kernel(Entries entries, double2* of_tile) {
  const index_t tile = blockIdx.x;
  const Entry& slot = entries.at[find_slot<&Entry::first_tile>(entries.at, entries.slots, tile)];
  const auto* const w = static_cast<const S*>(slot.weight);
  const auto* const g = static_cast<const S*>(slot.gradient);
  const index_t own = tile - slot.first_tile;
  const double2 squares = slot.packs != 0 ? flat_squares<kPackSize<S>>(w, g, own, slot.size)
                                          : flat_squares<1>(w, g, own, slot.size);
  if (threadIdx.x == 0) of_tile[tile] = squares;
}

__global__ void totals_kernel(Entries entries, const double2* of_tile) {
  const Entry& slot = entries.at[blockIdx.x];
  const double2 sum = sum_tiles(of_tile + slot.first_tile, slot.tiles);
  if (threadIdx.x != 0) return;
  slot.totals[0] = sum.x;
  slot.totals[1] = sum.y;
}

template <int N, class S>
__device__ void update_tile(const Entry& slot, index_t tile, const Step& step, S rate) {
  auto *const w = static_cast<S*>(slot.weight), *const m = static_cast<S*>(slot.first_moment),
              *const v = static_cast<S*>(slot.second_moment);
  const auto* const g = static_cast<const S*>(slot.gradient);
  const S beta1 = static_cast<S>(step.beta1), rest1 = static_cast<S>(1 - step.beta1);
  const S beta2 = static_cast<S>(step.beta2), rest2 = static_cast<S>(1 - step.beta2);
  const S correction2 = static_cast<S>(step.bias2), epsilon = static_cast<S>(step.epsilon);
  const S decay = static_cast<S>(slot.decays != 0 ? step.learning_rate * step.weight_decay : 0.0);
  for_flat_tile<N>(tile, slot.size, [&](auto pack, index_t i) {
    S weight[pack()], gradient[pack()], first[pack()], second[pack()];
    load_values(w + i, weight);
    load_values(g + i, gradient);
    load_values(m + i, first);
    load_values(v + i, second);
#pragma unroll
    for (int j = 0; j < pack(); ++j) {
      first[j] = beta1 * first[j] + rest1 * gradient[j];
      second[j] = beta2 * second[j] + rest2 * (gradient[j] * gradient[j]);
      weight[j] -= rate * (first[j] / (std::sqrt(second[j] * correction2) + epsilon)) + decay * weight[j];
    }
    store_values(m + i, first);
    store_values(v + i, second);
    store_values(w + i, weight);
  });
}

template <class S>
__global__ void update_kernel(Entries entries, Step step) {
  __shared__ S rate;
  const Entry& slot = entries.at[find_slot<&Entry::first_tile>(entries.at, entries.slots, blockIdx.x)];
  if (threadIdx.x == 0) {
    const double rms = std::sqrt(slot.totals[0] / static_cast<double>(slot.global_size));
    const double scale = step.scale_by_rms ? std::fmax(step.epsilon_parameter, rms) : 1.0;
    rate = static_cast<S>(step.learning_rate * scale * step.bias1);
  }
  __syncthreads();
  const index_t tile = index_t{blockIdx.x} - slot.first_tile;
  if (slot.packs != 0) {
    update_tile<kPackSize<S>>(slot, tile, step, rate);
  } else {
    update_tile<1>(slot, tile, step, rate);
  }
}

Entries upload(CudaDevice& device, SlotTable& table, std::span<const AdamWSlot> slots) {
  std::vector<Entry> entries;
  index_t tiles = 0;
  for (const AdamWSlot& slot : slots) {
    check(slot.weight.dtype == slots[0].weight.dtype, "AdamW: slots of {} and {} in one call",
          slot.weight.describe(), slots[0].weight.describe());
    const index_t size = slot.weight.numel(), count = (size + kFlatTile - 1) / kFlatTile;
    entries.push_back({.weight = slot.weight.data,
                       .gradient = slot.gradient.data,
                       .first_moment = slot.first_moment.data,
                       .second_moment = slot.second_moment.data,
                       .totals = slot.totals.as<double>(),
                       .size = size,
                       .global_size = slot.global_size,
                       .decays = slot.decay,
                       .packs = aligned({slot.weight.data, slot.gradient.data, slot.first_moment.data,
                                         slot.second_moment.data}),
                       .first_tile = tiles,
                       .tiles = count});
    tiles += count;
  }
  return {table.update(device, entries), static_cast<index_t>(entries.size()), tiles};
}

}  // namespace

void CudaBackend::do_adamw_statistics(std::span<const AdamWSlot> slots) {
  if (slots.empty()) return;
  const Entries entries = upload(device_, adamw_slots_, slots);
  auto* const of_tile =
      reinterpret_cast<double2*>(device_.workspace(entries.tiles * static_cast<index_t>(sizeof(double2))));
  dispatch(slots[0].weight.dtype, [&]<class T>() {
    launch(device_, {.blocks = block_count(entries.tiles, 1), .threads = kTileThreads},
           statistics_kernel<stat_t<T>>, entries, of_tile);
  });
  launch(device_, {.blocks = block_count(entries.slots, 1), .threads = kTileThreads}, totals_kernel, entries,
         of_tile);
}

void CudaBackend::do_adamw_update(std::span<const AdamWSlot> slots, const AdamWOptions& options) {
  if (slots.empty()) return;
  const Entries entries = upload(device_, adamw_slots_, slots);
  const auto number = static_cast<double>(options.step);
  const Step step{.learning_rate = options.learning_rate,
                  .bias1 = 1 / (1 - std::pow(options.beta1, number)),
                  .bias2 = 1 / (1 - std::pow(options.beta2, number)),
                  .beta1 = options.beta1,
                  .beta2 = options.beta2,
                  .epsilon = options.epsilon,
                  .weight_decay = options.weight_decay,
                  .epsilon_parameter = options.epsilon_parameter,
                  .scale_by_rms = options.scale_by_rms};
  dispatch(slots[0].weight.dtype, [&]<class T>() {
    launch(device_, {.blocks = block_count(entries.tiles, 1), .threads = kTileThreads},
           update_kernel<stat_t<T>>, entries, step);
  });
}

}  // namespace regroup
