// Tensors of any device through host memory and MPI.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "parallel/communicator.h"

namespace regroup {

// For a device whose memory MPI must not see, where NCCL is not to be had (several ranks on one GPU): each
// piece is copied to pinned host memory, goes through a make_mpi_communicator(), and back. The same bits as
// MPI gives for the same values in host memory. `backend` outlives it.
std::unique_ptr<Communicator> make_host_staged_communicator(std::string name, const ProcessGroup& group,
                                                            Backend& backend);

}  // namespace regroup
