// Tensors of GPUs from GPU to GPU.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/base/log.h"
#include "parallel/communicator.h"

namespace regroup {

struct NcclOptions {
  // Ring and the simple protocol, without NVLink SHARP: the order of every sum is a function of the ranks
  // alone. Otherwise NCCL chooses by size and topology; where the switches add, sums of the same values may
  // differ in their last bits from call to call.
  bool deterministic = false;
  Log log = Log();  // of a collective that fails, before anything is tried that might wait for the device
  // How long the host waits for the device before a collective counts as hung; infinity: for ever.
  double deadline_seconds = 600;
};

// Whether this build has NCCL.
bool has_nccl();

// Over NCCL for the backend of --device cuda, on a stream of its own that takes turns with the backend's by
// events. Bootstrapped over `group`; MPI sees no device memory. Every rank of the group needs a GPU to
// itself. While the host waits for the device, NCCL is asked for errors: a failed or hung collective is told
// at once, its communicator aborted, and it is a SystemError that names rank, axis and collective; whoever
// catches it ends the job (main() does). All communicators' collectives run in the order in which the host
// gives them. `backend` outlives it.
std::unique_ptr<Communicator> make_nccl_communicator(std::string name, const ProcessGroup& group,
                                                     Backend& backend,
                                                     const NcclOptions& options = NcclOptions());

}  // namespace regroup
