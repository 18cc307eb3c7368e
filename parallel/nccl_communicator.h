// Tensors of GPUs from GPU to GPU.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "parallel/communicator.h"

namespace regroup {

struct NcclOptions {
  // Ring and the simple protocol: the order of every sum is a function of the ranks alone. Otherwise NCCL
  // chooses by size and topology, the same on every run of one cluster. NVLink SHARP is off in either case,
  // unless the environment says NCCL_NVLS_ENABLE=1: its sums differ from call to call.
  bool deterministic = false;
  // How long the host waits for the device before a collective counts as hung; infinity: for ever.
  double deadline_seconds = 600;
};

// Whether this build has NCCL.
bool has_nccl();

// Over NCCL for the backend of --device cuda, on a stream of its own that takes turns with the backend's by
// events. Bootstrapped over `group`; MPI sees no device memory. Every rank of the group needs a GPU to
// itself. While the host waits for the device, NCCL is asked for errors: a failed or hung collective is a
// SystemError that names rank, axis and collective; whoever catches it ends the job (main() does). `backend`
// outlives it.
std::unique_ptr<Communicator> make_nccl_communicator(std::string name, const ProcessGroup& group,
                                                     Backend& backend, const NcclOptions& options = {});

}  // namespace regroup
