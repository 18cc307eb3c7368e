// The MPI side of a ProcessGroup, for the files of this folder: the owner of an MPI_Comm, and the one check
// that every MPI call of the project goes through.
#pragma once

#include <exception>

#include <mpi.h>

#include "kernels/base/error.h"
#include "parallel/process_group.h"

namespace regroup {

// Counts of the MPI calls used here are int: larger transfers go in chunks of this many elements.
constexpr std::size_t kMpiChunk = std::size_t{1} << 30;

MPI_Op mpi_op(ReduceOp op);

// MPI's text for a return code.
std::string mpi_error_text(int code);

// SystemError naming the call and the reason where `code` is not MPI_SUCCESS.
inline void check_mpi(int code, const char* call) {
  if (code != MPI_SUCCESS) throw SystemError("{} failed: {}", call, mpi_error_text(code));
}

// Owns a communicator, or borrows MPI_COMM_WORLD.
class ProcessGroup::Handle {
 public:
  Handle(MPI_Comm comm, bool owned) : comm_(comm), owned_(owned) {}
  ~Handle() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // Freeing is collective: the other ranks may not be here while an exception is unwinding this one.
    if (owned_ && finalized == 0 && std::uncaught_exceptions() == 0) MPI_Comm_free(&comm_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  MPI_Comm get() const { return comm_; }

 private:
  MPI_Comm comm_;
  bool owned_;
};

}  // namespace regroup
