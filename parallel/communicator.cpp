#include "parallel/communicator.h"

#include <chrono>
#include <utility>

namespace regroup {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class PlanCommunicator final : public Communicator {
 public:
  PlanCommunicator(std::string name, int rank, int size) : Communicator(std::move(name), rank, size) {}

 private:
  void do_all_reduce(Tensor, ReduceOp) override {}
  void do_broadcast(Tensor, int) override {}
};

}  // namespace

Communicator::Communicator(std::string name, int rank, int size)
    : name_(std::move(name)), rank_(rank), size_(size) {
  check(size >= 1 && 0 <= rank && rank < size, "{}: rank {} of {} ranks", name_, rank, size);
}

void Communicator::all_reduce(Tensor x, ReduceOp op) {
  check(x.is_contiguous(), "{}: all_reduce of {}, which is not dense", name_, x.describe());
  if (size_ == 1 || x.numel() == 0) return;
  check(static_cast<bool>(x), "{}: all_reduce of {} without memory", name_, x.describe());
  const auto start = Clock::now();
  do_all_reduce(x, op);
  seconds_ += seconds_since(start);
  bytes_ += static_cast<double>(x.bytes());
}

void Communicator::broadcast(Tensor x, int root) {
  check(x.is_contiguous(), "{}: broadcast of {}, which is not dense", name_, x.describe());
  check(0 <= root && root < size_, "{}: broadcast from rank {} of {}", name_, root, size_);
  if (size_ == 1 || x.numel() == 0) return;
  check(static_cast<bool>(x), "{}: broadcast of {} without memory", name_, x.describe());
  const auto start = Clock::now();
  do_broadcast(x, root);
  seconds_ += seconds_since(start);
  bytes_ += static_cast<double>(x.bytes());
}

std::unique_ptr<Communicator> make_plan_communicator(std::string name, int rank, int size) {
  return std::make_unique<PlanCommunicator>(std::move(name), rank, size);
}

}  // namespace regroup
