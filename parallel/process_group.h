// Processes and the host values they exchange. Tensors travel through a Communicator (communicator.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/heartbeat.h"

namespace regroup {

enum class ReduceOp { kSum, kMax, kMin };

// MPI for the life of this object: MPI_Init_thread(FUNNELED) ... MPI_Finalize. One per process, made by
// main(), where the launcher is absent it is a world of one.
class MpiEnvironment {
 public:
  MpiEnvironment();   // UserError where this MPI library cannot do what the program needs
  ~MpiEnvironment();  // finalizes; where an exception is being unwound on a world of several ranks it does
                      // not wait
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;

  // Ends every rank of the job at once with `exit_code`. Does not return.
  [[noreturn]] void abort(int exit_code) const;
};

// A set of ranks: RAII over an MPI communicator; copies share it. All members but rank/size/heartbeat are
// collective: every rank of the group calls them in the same order. SystemError naming the call where MPI
// fails. Each is a Heartbeat::Wait.
class ProcessGroup {
 public:
  // All ranks of the job, with a heartbeat of its own, which every group split from it shares.
  static ProcessGroup world();

  int rank() const { return rank_; }
  int size() const { return size_; }
  Heartbeat& heartbeat() const { return *heartbeat_; }
  const std::shared_ptr<Heartbeat>& shared_heartbeat() const { return heartbeat_; }

  // The ranks that give the same color, ordered by key then by rank here.
  ProcessGroup split(int color, int key) const;
  // The ranks that share this rank's host.
  ProcessGroup split_by_host() const;

  void barrier() const;
  // In place, elementwise.
  void all_reduce(std::span<double> values, ReduceOp op) const;
  void all_reduce(std::span<std::uint64_t> values, ReduceOp op) const;
  // Every rank's text, by rank.
  std::vector<std::string> all_gather(const std::string& text) const;
  std::vector<std::vector<std::uint64_t>> all_gather(const std::vector<std::uint64_t>& values) const;
  // Bytes for every rank and from every rank, one rank's behind the other's: `send_bytes[r]` go to rank r,
  // `receive_bytes[r]` come from it. All of one rank's together are less than 2 GiB.
  void all_to_all(const std::byte* send, std::span<const std::uint64_t> send_bytes, std::byte* receive,
                  std::span<const std::uint64_t> receive_bytes) const;
  // Root's text or number, on every rank.
  std::string broadcast(const std::string& text, int root = 0) const;
  double broadcast(double number, int root = 0) const;

  // Runs `work` on `root` alone; where it throws there, every rank throws the same error, as
  // rethrow_as_error() has it. For things one rank does for all (making a directory): nobody is left waiting.
  template <class Work>
  void run_on(int root, Work&& work) const {
    std::string failure;
    if (rank_ == root) failure = failure_of(work);
    raise(broadcast(failure, root));
  }
  // Runs `work` on every rank; where it throws on any, every rank throws the error of the lowest such rank,
  // as run_on() does, and the message names it unless all failed alike.
  template <class Work>
  void run_together(Work&& work) const {
    raise_first(all_gather(failure_of(work)));
  }

  class Handle;  // the MPI_Comm; defined in mpi_handle.h, for files of this folder only
  const Handle& handle() const { return *handle_; }

 private:
  ProcessGroup(std::shared_ptr<const Handle> handle, std::shared_ptr<Heartbeat> heartbeat);
  template <class Work>
  static std::string failure_of(Work&& work);  // "" or a tagged message
  static void raise(const std::string& failure);
  static void raise_first(const std::vector<std::string>& failures);  // by rank

  std::shared_ptr<const Handle> handle_;
  std::shared_ptr<Heartbeat> heartbeat_;
  int rank_ = 0;
  int size_ = 1;
};

std::string describe_current_exception();  // tagged so that ProcessGroup::raise() throws the same kind again

template <class Work>
std::string ProcessGroup::failure_of(Work&& work) {
  try {
    work();
  } catch (...) {
    return describe_current_exception();
  }
  return "";
}

}  // namespace regroup
