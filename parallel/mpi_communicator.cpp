#include <algorithm>
#include <array>
#include <span>
#include <utility>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/mpi_handle.h"

namespace regroup {
namespace {

// Elements a collective moves at once: MPI counts are int, and what a chunk needs stays near the cache.
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
      : Communicator(std::move(name), group), group_(std::move(group)) {
    if (size() == 1) return;
    const auto ranks = static_cast<std::size_t>(size());
    received_.resize(static_cast<std::size_t>(kChunk) + ranks);  // parts are rounded up
    for (auto* list : {&part_begins_, &part_counts_, &received_begins_, &received_counts_})
      list->resize(ranks);
  }

  std::string transport() const override { return "MPI"; }

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

  // Half the bytes of a sum in float32 staging: each rank receives everyone's values of its own part, reduces
  // them in float32 in the order of the ranks, rounds once, and hands the part to all.
  void reduce_bfloat16(std::span<bfloat16> values, ReduceOp op) {
    const MPI_Comm comm = group_.handle().get();
    const int count = static_cast<int>(values.size());
    const int longest = (count + size() - 1) / size();
    for (int r = 0; r < size(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      part_begins_[i] = std::min(count, r * longest);
      part_counts_[i] = std::min(count, (r + 1) * longest) - part_begins_[i];
    }
    const auto mine =
        values.subspan(static_cast<std::size_t>(part_begins_[static_cast<std::size_t>(rank())]),
                       static_cast<std::size_t>(part_counts_[static_cast<std::size_t>(rank())]));
    for (int r = 0; r < size(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      received_begins_[i] = r * static_cast<int>(mine.size());
      received_counts_[i] = static_cast<int>(mine.size());
    }
    check_mpi(
        MPI_Alltoallv(values.data(), part_counts_.data(), part_begins_.data(), MPI_UINT16_T, received_.data(),
                      received_counts_.data(), received_begins_.data(), MPI_UINT16_T, comm),
        "MPI_Alltoallv");
    reduce_over_ranks(mine, op);
    check_mpi(MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, values.data(), part_counts_.data(),
                             part_begins_.data(), MPI_UINT16_T, comm),
              "MPI_Allgatherv");
  }

  void reduce_over_ranks(std::span<bfloat16> mine, ReduceOp op) const {
    switch (op) {
      case ReduceOp::kSum:
        return combine(mine, [](float a, float b) { return a + b; });
      case ReduceOp::kMax:
        return combine(mine, [](float a, float b) { return a > b ? a : b; });
      case ReduceOp::kMin:
        return combine(mine, [](float a, float b) { return a < b ? a : b; });
    }
  }

  template <class Combine>
  void combine(std::span<bfloat16> mine, Combine&& combine_two) const {
    constexpr std::size_t kBlock = 1024;
    std::array<float, kBlock> total{};
    for (std::size_t begin = 0; begin < mine.size(); begin += kBlock) {
      const std::size_t count = std::min(kBlock, mine.size() - begin);
      for (std::size_t r = 0; r < static_cast<std::size_t>(size()); ++r) {
        const bfloat16* part = received_.data() + r * mine.size() + begin;
        if (r == 0) {
          for (std::size_t i = 0; i < count; ++i) total[i] = static_cast<float>(part[i]);
        } else {
          for (std::size_t i = 0; i < count; ++i) {
            total[i] = combine_two(total[i], static_cast<float>(part[i]));
          }
        }
      }
      for (std::size_t i = 0; i < count; ++i) mine[begin + i] = bfloat16(total[i]);
    }
  }

  ProcessGroup group_;
  std::vector<bfloat16> received_;  // one part from every rank
  std::vector<int> part_begins_, part_counts_, received_begins_, received_counts_;
};

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(std::string name, const ProcessGroup& group) {
  return std::make_unique<MpiCommunicator>(std::move(name), group);
}

}  // namespace regroup
