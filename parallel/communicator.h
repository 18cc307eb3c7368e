// How tensors of a device travel between ranks. One interface for MPI (host) and NCCL (device).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "kernels/tensor.h"
#include "parallel/process_group.h"

namespace regroup {

// Every member is collective and in place, works on dense tensors, and for size 1 is an exact no-op. It takes
// its place among the device's ops: it sees what was issued before, and what is issued later sees its result.
// The same ranks with the same values give the same bits on every rank, and on every call (NCCL: where it is
// deterministic). bfloat16 is summed in float32 and rounded once (NCCL: rounded by every rank that adds).
class Communicator {
 public:
  virtual ~Communicator() = default;

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }  // "tp", "dp", ...: for messages

  void all_reduce(Tensor x, ReduceOp op = ReduceOp::kSum);
  // The same of several tensors, which may travel as one.
  void all_reduce(std::span<const Tensor> xs, ReduceOp op = ReduceOp::kSum);
  void broadcast(Tensor x, int root);

  // all_reduce() in two halves: it may run beside the ops issued until finish(), none of which may touch x.
  // Several may be started; finish() waits for all.
  void start_all_reduce(Tensor x, ReduceOp op = ReduceOp::kSum);
  void finish();

  // How it travels, for the log: "MPI", "NCCL 2.28.9", ...
  virtual std::string transport() const = 0;

  double seconds() const { return seconds_; }    // the host spent in here, waits included
  double bytes_moved() const { return bytes_; }  // payload handed to collectives

 protected:
  Communicator(std::string name, const ProcessGroup& group);
  Communicator(std::string name, int rank, int size);  // without anybody to wait for

  Heartbeat& heartbeat() const { return *heartbeat_; }

 private:
  virtual void do_all_reduce(Tensor x, ReduceOp op) = 0;
  virtual void do_all_reduce(std::span<const Tensor> xs, ReduceOp op);
  virtual void do_start_all_reduce(Tensor x, ReduceOp op) { do_all_reduce(x, op); }
  virtual void do_finish() {}
  virtual void do_broadcast(Tensor x, int root) = 0;

  template <class Work>
  void move(const std::string& what, std::span<const Tensor> xs, Work&& work);

  std::shared_ptr<Heartbeat> heartbeat_;
  std::string name_, all_reduce_, broadcast_;  // "tp", "tp all_reduce", "tp broadcast"
  int rank_;
  int size_;
  double seconds_ = 0;
  double bytes_ = 0;
};

// Makes the communicator of one axis of a mesh over the ranks of `group`. Collective over the group.
using CommunicatorFactory =
    std::function<std::unique_ptr<Communicator>(std::string name, const ProcessGroup& group)>;

// Over MPI, for tensors in host memory. int32, float32, float64, bfloat16.
std::unique_ptr<Communicator> make_mpi_communicator(std::string name, const ProcessGroup& group);

// Pretends to be rank `rank` of `size` and moves nothing: for memory plans.
std::unique_ptr<Communicator> make_plan_communicator(std::string name, int rank, int size);

}  // namespace regroup
