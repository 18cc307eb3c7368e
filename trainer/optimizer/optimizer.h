// What every optimizer does: one update from the summed gradients, global over tensor-parallel ranks.
#pragma once

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "parallel/mesh.h"
#include "trainer/model/parameter_store.h"

namespace regroup {

// By parameter, the step at which its moments began, where that is not an optimizer's step_offset.
using MomentOffsets = std::map<std::string, index_t>;

class Optimizer {
 public:
  virtual ~Optimizer() = default;

  // Updates the store's masters and weights from its gradients (already summed over dp and KV replicas) at
  // 0-based step `step`. Norms and means are over global tensors: partial sums of all tensors travel together
  // over the tp axis. Collective over tp. Returns the norm of the whole gradient, every replicated element
  // counted once, before any clipping. Where `takes` refuses that norm, nothing is changed; its answer is the
  // same on all ranks.
  using Verdict = std::function<bool(double norm)>;
  double update(
      index_t step, double learning_rate,
      const Verdict& takes = [](double norm) { return std::isfinite(norm); }) {
    return do_update(step, learning_rate, takes);
  }

  // The state under "<parameter>.<slot>" with global shapes; memory of the device, owned by the optimizer.
  virtual std::vector<ShardedTensor> state() const = 0;

  // Bytes of state on this rank.
  virtual index_t state_bytes() const = 0;

 private:
  virtual double do_update(index_t step, double learning_rate, const Verdict& takes) = 0;
};

// Per-tensor sums of an update: a float64 matrix [parameters, 4] at the head of a buffer that also holds
// those row or column sums that are partial on a rank. Shared by the optimizers.
class UpdateTotals {
 public:
  // `extra`: float64 elements beyond the matrix.
  UpdateTotals(Backend& backend, const ParameterStore& store, const Mesh& mesh, index_t extra = 0);

  Tensor row(std::size_t parameter) const;          // float64 [4]
  Tensor extra(index_t begin, index_t size) const;  // float64 [size], from the part beyond the matrix

  // Sums columns 0 and 1 (and all of `extra`) over tp, each distinct slice once. The caller has zeroed the
  // extra parts of slices that are not this rank's to give (see gives()). Returns the sum of column 1: the
  // squared gradient norm.
  double reduce_statistics();
  // Sums column 2 over tp, each distinct slice once, and column 3, each distinct row once.
  void reduce_moments();
  // Whether this rank's slice of the parameter counts in global sums (replica 0).
  bool gives(std::size_t parameter) const { return store_.slice(parameter).replica == 0; }
  int tp_rank() const { return mesh_.tp_rank(); }
  int tp_size() const { return mesh_.tp_size(); }

 private:
  void reduce(index_t elements);

  Backend& backend_;
  const ParameterStore& store_;
  const Mesh& mesh_;
  Buffer buffer_;
  std::vector<double> host_;
};

// The step at which the moments of each parameter of the store began, in its order.
std::vector<index_t> offsets_of(const ParameterStore& store, index_t step_offset,
                                const MomentOffsets& others);

// The parameter's local slice as a matrix [R, C]; a vector is one row.
Tensor as_matrix(Tensor tensor);

}  // namespace regroup
