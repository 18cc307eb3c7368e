#include "parallel/host_staged_communicator.h"

#include <algorithm>
#include <utility>

namespace regroup {
namespace {

// What is copied and sent at once: 4 Mi elements of float32. A multiple of the pieces MPI sums in, so that
// the order of every sum is that of the tensor in one.
constexpr index_t kPieceBytes = index_t{16} << 20;

class HostStagedCommunicator final : public Communicator {
 public:
  HostStagedCommunicator(const std::string& name, const ProcessGroup& group, Backend& backend)
      : Communicator(name, group), backend_(backend), mpi_(make_mpi_communicator(name, group)) {
    if (size() > 1) staging_ = backend.allocate_host(kPieceBytes);
  }

  std::string transport() const override { return "MPI through host memory"; }

 private:
  void do_all_reduce(Tensor x, ReduceOp op) override {
    through_host(x, [&](Tensor piece) { mpi_->all_reduce(piece, op); });
  }
  void do_broadcast(Tensor x, int root) override {
    through_host(x, [&](Tensor piece) { mpi_->broadcast(piece, root); });
  }

  template <class Work>
  void through_host(const Tensor& x, Work&& work) {
    const Tensor flat(x.data, x.dtype, {x.numel()});
    const index_t most = kPieceBytes / size_of(x.dtype);
    for (index_t begin = 0; begin < flat[0]; begin += most) {
      const Tensor piece = flat.slice(0, begin, std::min(flat[0], begin + most));
      const Tensor host = staging_.tensor(x.dtype, {piece[0]});
      backend_.copy_to_host(piece, host.data);
      work(host);
      backend_.copy_from_host(host.data, piece);
    }
  }

  Backend& backend_;
  std::unique_ptr<Communicator> mpi_;
  Buffer staging_;
};

}  // namespace

std::unique_ptr<Communicator> make_host_staged_communicator(std::string name, const ProcessGroup& group,
                                                            Backend& backend) {
  return std::make_unique<HostStagedCommunicator>(name, group, backend);
}

}  // namespace regroup
