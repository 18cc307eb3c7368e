// How many sequences a rank takes at once where the user leaves it open.
#pragma once

#include <functional>
#include <string>

#include "trainer/run/model_runner.h"

namespace regroup {

// Bytes that model, gradients, optimizer and activations take of a device like `device` on this rank of the
// mesh, from a plan: the same code on a backend without memory. `options`: of a training runner. `optimizer`:
// "adafactor" or "adamw".
index_t training_bytes(const Backend& device, const Mesh& mesh, const ModelConfig& config,
                       const ModelRunner::Options& options, const std::string& optimizer);

// The largest divisor of `share`, at most `most`, for which `fits` holds; 1 where it holds for none.
index_t fitting_micro_batch(index_t share, index_t most, const std::function<bool(index_t)>& fits);

// What is left free beside the plan: work memory of cuBLAS and cuDNN, buffers of NCCL, gaps.
constexpr index_t kUnplannedBytes = index_t{3} << 30;

}  // namespace regroup
