#include "parallel/communicator.h"

#include <chrono>
#include <utility>
#include <vector>

namespace regroup {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class PlanCommunicator final : public Communicator {
 public:
  PlanCommunicator(std::string name, int rank, int size) : Communicator(std::move(name), rank, size) {}
  std::string transport() const override { return "none"; }

 private:
  void do_all_reduce(Tensor, ReduceOp) override {}
  void do_broadcast(Tensor, int) override {}
};

}  // namespace

Communicator::Communicator(std::string name, const ProcessGroup& group)
    : Communicator(std::move(name), group.rank(), group.size()) {
  heartbeat_ = group.shared_heartbeat();
}

Communicator::Communicator(std::string name, int rank, int size)
    : heartbeat_(std::make_shared<Heartbeat>()),
      name_(std::move(name)),
      all_reduce_(name_ + " all_reduce"),
      broadcast_(name_ + " broadcast"),
      rank_(rank),
      size_(size) {
  check(size >= 1 && 0 <= rank && rank < size, "{}: rank {} of {} ranks", name_, rank, size);
}

// Calls work() with the tensors that have elements, where there are such and another rank to move them to.
template <class Work>
void Communicator::move(const std::string& what, std::span<const Tensor> xs, Work&& work) {
  std::vector<Tensor> moved;
  for (const Tensor& x : xs) {
    check(x.is_contiguous(), "{} of {}, which is not dense", what, x.describe());
    if (size_ == 1 || x.numel() == 0) continue;
    check(static_cast<bool>(x), "{} of {} without memory", what, x.describe());
    moved.push_back(x);
  }
  if (moved.empty()) return;
  const Heartbeat::Wait wait(*heartbeat_, what);
  const auto start = Clock::now();
  work(moved);
  seconds_ += seconds_since(start);
  for (const Tensor& x : moved) bytes_ += static_cast<double>(x.bytes());
}

void Communicator::all_reduce(Tensor x, ReduceOp op) {
  move(all_reduce_, {&x, 1}, [&](const auto&) { do_all_reduce(x, op); });
}

void Communicator::all_reduce(std::span<const Tensor> xs, ReduceOp op) {
  move(all_reduce_, xs, [&](const std::vector<Tensor>& moved) { do_all_reduce(moved, op); });
}
void Communicator::do_all_reduce(std::span<const Tensor> xs, ReduceOp op) {
  for (const Tensor& x : xs) do_all_reduce(x, op);
}

void Communicator::start_all_reduce(Tensor x, ReduceOp op) {
  move(all_reduce_, {&x, 1}, [&](const auto&) { do_start_all_reduce(x, op); });
}

void Communicator::finish() {
  if (size_ == 1) return;
  const Heartbeat::Wait wait(*heartbeat_, all_reduce_);
  const auto start = Clock::now();
  do_finish();
  seconds_ += seconds_since(start);
}

void Communicator::broadcast(Tensor x, int root) {
  check(0 <= root && root < size_, "{}: broadcast from rank {} of {}", name_, root, size_);
  move(broadcast_, {&x, 1}, [&](const auto&) { do_broadcast(x, root); });
}

std::unique_ptr<Communicator> make_plan_communicator(std::string name, int rank, int size) {
  return std::make_unique<PlanCommunicator>(std::move(name), rank, size);
}

}  // namespace regroup
