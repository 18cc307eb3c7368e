// The host-staged communicator gives the bits that MPI gives, in one go and in two halves.
#include "parallel/host_staged_communicator.h"

#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/make_backend.h"

namespace regroup {
namespace {

class HostStaged : public testing::Test {
 protected:
  // Values that differ between ranks and need rounding when they are added.
  Buffer values(DType dtype, index_t count) {
    const Buffer wide = backend_.allocate(count * size_of(DType::kFloat32));
    Buffer result = backend_.allocate(count * size_of(dtype));
    const Philox random(7, RandomPurpose::kTest, static_cast<std::uint64_t>(world_.rank()));
    const Tensor numbers = wide.tensor(DType::kFloat32, {count});
    for (index_t i = 0; i < count; ++i) {
      numbers.as<float>()[i] = static_cast<float>(random.uniform(static_cast<std::uint64_t>(i)) - 0.5);
    }
    backend_.cast(numbers, result.tensor(dtype, {count}));
    return result;
  }

  ProcessGroup world_ = ProcessGroup::world();
  std::unique_ptr<Backend> owned_ = make_backend({.threads = 1});
  Backend& backend_ = *owned_;
  std::unique_ptr<Communicator> mpi_ = make_mpi_communicator("world", world_);
  std::unique_ptr<Communicator> staged_ = make_host_staged_communicator("world", world_, backend_);
};

TEST_F(HostStaged, GivesTheBitsOfMpi) {
  // Around the size of a piece, which is 4 Mi elements of float32.
  for (const index_t count : {index_t{1}, index_t{1000}, (index_t{1} << 22) + 5}) {
    for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
      const Buffer want = values(dtype, count), got = values(dtype, count);
      mpi_->all_reduce(want.tensor(dtype, {count}));
      staged_->start_all_reduce(got.tensor(dtype, {count}));
      staged_->finish();
      EXPECT_EQ(std::memcmp(want.data(), got.data(), static_cast<std::size_t>(want.bytes())), 0)
          << name_of(dtype) << " x " << count;
    }
  }
}

TEST_F(HostStaged, Broadcasts) {
  const Buffer data = values(DType::kFloat32, 100);
  const int root = world_.size() - 1;
  staged_->broadcast(data.tensor(DType::kFloat32, {100}), root);
  const Philox random(7, RandomPurpose::kTest, static_cast<std::uint64_t>(root));
  EXPECT_EQ(data.tensor(DType::kFloat32, {100}).as<float>()[42],
            static_cast<float>(random.uniform(42) - 0.5));
}

}  // namespace
}  // namespace regroup
