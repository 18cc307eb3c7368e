// The ranks as a grid of named axes, and the communicators along them.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "parallel/communicator.h"

namespace regroup {

// How many ways a run is split along each axis.
struct Layout {
  int data_parallel = 1;
  int tensor_parallel = 1;
  int ranks() const { return data_parallel * tensor_parallel; }
};

// Completes a layout for `ranks` ranks: a data_parallel of 0 becomes ranks / tensor_parallel. UserError, with
// the one equation data_parallel x tensor_parallel = ranks in it, where that cannot hold.
Layout complete_layout(Layout layout, int ranks);

// Rank r has the coordinates tp = r % tensor_parallel, dp = r / tensor_parallel: neighbours share a host's
// links.
class Mesh {
 public:
  // `kv_groups`: every number of key/value groups the model uses; for each G < tp the tp axis is cut into
  // KV-replica groups of tp / G neighbouring ranks that hold the same group. `make` gives the axes their
  // communicators. Collective over `world`.
  Mesh(const ProcessGroup& world, Layout layout, const std::vector<index_t>& kv_groups,
       const CommunicatorFactory& make = make_mpi_communicator);
  // The mesh as rank `rank` would see it, with communicators that move nothing: for memory plans.
  static Mesh plan(Layout layout, int rank, const std::vector<index_t>& kv_groups);

  const Layout& layout() const { return layout_; }
  int tp_rank() const { return tp_->rank(); }
  int tp_size() const { return tp_->size(); }
  int dp_rank() const { return dp_->rank(); }
  int dp_size() const { return dp_->size(); }

  Communicator& tp() const { return *tp_; }
  Communicator& dp() const { return *dp_; }
  // The world's; of a plan, one that nobody watches.
  Heartbeat& heartbeat() const { return *heartbeat_; }
  // The ranks that hold the same key/value group when there are `kv_groups` of them; size 1 where G >= tp.
  Communicator& kv_replicas(index_t kv_groups) const;

 private:
  Mesh() = default;
  Layout layout_;
  std::shared_ptr<Heartbeat> heartbeat_ = std::make_shared<Heartbeat>();
  std::unique_ptr<Communicator> tp_, dp_, self_;
  std::map<index_t, std::unique_ptr<Communicator>> kv_replicas_;
};

}  // namespace regroup
