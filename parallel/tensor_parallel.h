// The conjugate pairs of tensor parallelism (Shoeybi et al. 2019, "f" and "g"): the only places where the tp
// axis talks inside a sub-block. A column-parallel product has its input whole on every rank and its output
// split; a row-parallel product has its input split and its output a partial sum.
#pragma once

#include "parallel/mesh.h"

namespace regroup {

// Leaving a row-parallel product in forward: partial sums become the sum, on every rank.
inline void leave_row_parallel(const Mesh& mesh, Tensor partial) { mesh.tp().all_reduce(partial); }

// Backward of entering a column-parallel product: each rank's input gradient is its columns' share.
inline void enter_column_parallel_backward(const Mesh& mesh, Tensor partial_gradient) {
  mesh.tp().all_reduce(partial_gradient);
}

}  // namespace regroup
