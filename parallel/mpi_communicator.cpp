#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/mpi_handle.h"

namespace regroup {
namespace {

// Elements a collective moves at once: long enough for the ring algorithms, short enough that the bfloat16
// staging stays small. Part of the sum's order, so it is fixed.
constexpr index_t kChunk = index_t{1} << 20;

MPI_Datatype mpi_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return MPI_DOUBLE;
    case DType::kFloat32:
      return MPI_FLOAT;
    case DType::kInt32:
      return MPI_INT32_T;
    case DType::kBFloat16:
      return MPI_UINT16_T;  // bits: for moving, not for arithmetic
  }
  throw InternalError("unknown dtype {}", static_cast<int>(dtype));
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(std::string name, ProcessGroup group)
      : Communicator(std::move(name), group.rank(), group.size()), group_(std::move(group)) {
    if (size() > 1) staging_.resize(kChunk);
  }

 private:
  template <class Work>
  static void for_each_chunk(const Tensor& x, Work&& work) {
    const index_t count = x.numel();
    for (index_t begin = 0; begin < count; begin += kChunk) {
      work(static_cast<std::byte*>(x.data) + begin * size_of(x.dtype),
           static_cast<int>(std::min(kChunk, count - begin)));
    }
  }

  void do_all_reduce(Tensor x, ReduceOp op) override {
    const MPI_Comm comm = group_.handle().get();
    for_each_chunk(x, [&](std::byte* data, int count) {
      if (x.dtype == DType::kBFloat16) {
        const std::span<bfloat16> values(reinterpret_cast<bfloat16*>(data), static_cast<std::size_t>(count));
        reduce_bfloat16(values, op);
      } else {
        check_mpi(MPI_Allreduce(MPI_IN_PLACE, data, count, mpi_type(x.dtype), mpi_op(op), comm),
                  "MPI_Allreduce");
      }
    });
  }

  void do_broadcast(Tensor x, int root) override {
    for_each_chunk(x, [&](std::byte* data, int count) {
      check_mpi(MPI_Bcast(data, count, mpi_type(x.dtype), root, group_.handle().get()), "MPI_Bcast");
    });
  }

  // In float32, rounded once at the end.
  void reduce_bfloat16(std::span<bfloat16> values, ReduceOp op) {
    std::transform(values.begin(), values.end(), staging_.begin(),
                   [](bfloat16 value) { return static_cast<float>(value); });
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, staging_.data(), static_cast<int>(values.size()), MPI_FLOAT,
                            mpi_op(op), group_.handle().get()),
              "MPI_Allreduce");
    std::transform(staging_.begin(), staging_.begin() + static_cast<std::ptrdiff_t>(values.size()),
                   values.begin(), [](float value) { return bfloat16(value); });
  }

  ProcessGroup group_;
  std::vector<float> staging_;
};

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(std::string name, const ProcessGroup& group) {
  return std::make_unique<MpiCommunicator>(std::move(name), group);
}

}  // namespace regroup
