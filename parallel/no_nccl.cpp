// nccl_communicator.h in a build without NCCL.
#include "parallel/nccl_communicator.h"

namespace regroup {

bool has_nccl() { return false; }

std::unique_ptr<Communicator> make_nccl_communicator(std::string, const ProcessGroup&, Backend&,
                                                     const NcclOptions&) {
  throw InternalError("NCCL was asked for in a build without it");
}

}  // namespace regroup
