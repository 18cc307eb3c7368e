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
  std::string transport() const override { return "none"; }

 private:
  void do_all_reduce(Tensor, ReduceOp) override {}
  void do_broadcast(Tensor, int) override {}
};

}  // namespace

Communicator::Communicator(std::string name, int rank, int size)
    : name_(std::move(name)), rank_(rank), size_(size) {
  check(size >= 1 && 0 <= rank && rank < size, "{}: rank {} of {} ranks", name_, rank, size);
}

template <class Work>
void Communicator::move(const char* what, const Tensor& x, Work&& work) {
  check(x.is_contiguous(), "{}: {} of {}, which is not dense", name_, what, x.describe());
  if (size_ == 1 || x.numel() == 0) return;
  check(static_cast<bool>(x), "{}: {} of {} without memory", name_, what, x.describe());
  const auto start = Clock::now();
  work();
  seconds_ += seconds_since(start);
  bytes_ += static_cast<double>(x.bytes());
}

void Communicator::all_reduce(Tensor x, ReduceOp op) {
  move("all_reduce", x, [&] { do_all_reduce(x, op); });
}

void Communicator::start_all_reduce(Tensor x, ReduceOp op) {
  move("all_reduce", x, [&] { do_start_all_reduce(x, op); });
}

void Communicator::finish() {
  const auto start = Clock::now();
  do_finish();
  seconds_ += seconds_since(start);
}

void Communicator::broadcast(Tensor x, int root) {
  check(0 <= root && root < size_, "{}: broadcast from rank {} of {}", name_, root, size_);
  move("broadcast", x, [&] { do_broadcast(x, root); });
}

std::unique_ptr<Communicator> make_plan_communicator(std::string name, int rank, int size) {
  return std::make_unique<PlanCommunicator>(std::move(name), rank, size);
}

}  // namespace regroup
