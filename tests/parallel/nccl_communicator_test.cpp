// NCCL's communicator: sums and broadcasts on device memory, in one go and in two halves; and that a rank
// that does not come, or fails, is an error on the others in time. On the emulated GPU NCCL is an emulation
// too.
#include "parallel/nccl_communicator.h"

#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/devices.h"

namespace regroup {
namespace {

class Nccl : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_nccl()) GTEST_SKIP() << "this build has no NCCL";
    if (world_.size() > 1) backend_->synchronize();
  }

  static double value(int rank, index_t i) {
    const Philox random(7, RandomPurpose::kTest, static_cast<std::uint64_t>(rank));
    return static_cast<double>(static_cast<int>(random.uniform(static_cast<std::uint64_t>(i)) * 2000) -
                               1000) /
           8;
  }
  // This rank's values on the device: eighths, whose sums are exact in every type but bfloat16.
  template <class T>
  Buffer values(index_t count) {
    std::vector<T> host;
    for (index_t i = 0; i < count; ++i) host.push_back(T(static_cast<float>(value(world_.rank(), i))));
    Buffer result = backend_->allocate(count * size_of(dtype_of<T>()));
    backend_->copy_from_host(host.data(), result.tensor(dtype_of<T>(), {count}));
    return result;
  }
  template <class T>
  std::vector<T> host(const Buffer& buffer, index_t count) {
    std::vector<T> result(static_cast<std::size_t>(count));
    backend_->copy_to_host(buffer.tensor(dtype_of<T>(), {count}), result.data());
    return result;
  }

  template <class T>
  void expect_sum(index_t count) {
    const auto communicator = make_nccl_communicator("world", world_, *backend_);
    const Buffer memory = values<T>(count), other = values<T>(count);
    communicator->all_reduce(memory.tensor(dtype_of<T>(), {count}));
    communicator->start_all_reduce(other.tensor(dtype_of<T>(), {count}));
    communicator->finish();
    const std::vector<T> got = host<T>(memory, count), again = host<T>(other, count);
    EXPECT_EQ(std::memcmp(got.data(), again.data(), got.size() * sizeof(T)), 0);
    for (index_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int rank = 0; rank < world_.size(); ++rank)
        sum += static_cast<float>(T(static_cast<float>(value(rank, i))));
      ASSERT_EQ(static_cast<float>(got[static_cast<std::size_t>(i)]),
                static_cast<float>(T(static_cast<float>(sum))));
    }
  }

  ProcessGroup world_ = ProcessGroup::world();
  std::unique_ptr<Backend> backend_ = test::make_test_backend(DeviceKind::kCuda);
};

TEST_F(Nccl, Sums) {
  for (const index_t count : {index_t{1}, index_t{1000}, (index_t{1} << 18) + 3}) {
    expect_sum<double>(count);
    expect_sum<float>(count);
    expect_sum<bfloat16>(count);
  }
}

TEST_F(Nccl, Broadcasts) {
  const auto communicator = make_nccl_communicator("world", world_, *backend_);
  const Buffer memory = values<float>(100);
  communicator->broadcast(memory.tensor(DType::kFloat32, {100}), world_.size() - 1);
  EXPECT_EQ(host<float>(memory, 100)[42], static_cast<float>(value(world_.size() - 1, 42)));
}

TEST_F(Nccl, SumsSeveralTensorsAsOne) {
  const auto communicator = make_nccl_communicator("kv", world_, *backend_);
  const index_t counts[] = {300, 0, 7};
  std::vector<Buffer> memory;
  std::vector<Tensor> tensors;
  for (const index_t count : counts) {
    memory.push_back(values<float>(count));
    tensors.push_back(memory.back().tensor(DType::kFloat32, {count}));
  }
  communicator->all_reduce(tensors);
  for (const std::size_t i : {0, 2}) {
    const std::vector<float> got = host<float>(memory[i], counts[i]);
    for (index_t n = 0; n < counts[i]; ++n) {
      double sum = 0;
      for (int rank = 0; rank < world_.size(); ++rank) sum += value(rank, n);
      ASSERT_EQ(got[static_cast<std::size_t>(n)], sum);
    }
  }
}

// On streams of their own, several in flight, between ops of the device: each sees what was issued before it.
TEST_F(Nccl, TakesTurnsWithTheDevice) {
  const auto tp = make_nccl_communicator("tp", world_, *backend_);
  const auto dp = make_nccl_communicator("dp", world_, *backend_);
  constexpr index_t kCount = 64;
  const Buffer x = backend_->allocate(kCount * 4), y = backend_->allocate(kCount * 4);
  const Tensor a = x.tensor(DType::kFloat32, {kCount}), b = y.tensor(DType::kFloat32, {kCount});
  const std::vector<float> ones(kCount, 1), twos(kCount, 2);
  backend_->copy_from_host(ones.data(), a);
  double sum = 1;
  for (int round = 0; round < 12; ++round) {
    backend_->copy_from_host(twos.data(), b);
    backend_->scale(b, 0.5);
    dp->start_all_reduce(b);  // world, beside what follows
    backend_->scale(a, 3);
    tp->all_reduce(a);
    backend_->scale(a, 0.25);
    dp->finish();
    backend_->add(a, b, a);
    sum = sum * 3 * world_.size() / 4 + world_.size();
  }
  EXPECT_EQ(host<float>(x, kCount)[kCount - 1], static_cast<float>(sum));
}

TEST_F(Nccl, SaysItsVersion) {
  EXPECT_EQ(make_nccl_communicator("world", world_, *backend_)->transport().substr(0, 5), "NCCL ");
}

std::string message_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const SystemError& error) {
    return error.what();
  }
  return "";
}

TEST_F(Nccl, ARankThatDoesNotComeIsAnErrorInTime) {
  if (world_.size() == 1) GTEST_SKIP() << "there is nobody to wait for";
  const auto communicator = make_nccl_communicator("dp", world_, *backend_, {.deadline_seconds = 0.2});
  const Buffer memory = values<float>(10);
  if (world_.rank() != 0) {
    testing::internal::CaptureStderr();
    const std::string message = message_of([&] {
      communicator->all_reduce(memory.tensor(DType::kFloat32, {10}));
      backend_->synchronize();
    });
    const std::string told = testing::internal::GetCapturedStderr();
    EXPECT_NE(told.find(message), std::string::npos) << told;
    EXPECT_NE(message.find("dp"), std::string::npos) << message;
    EXPECT_NE(message.find("all_reduce"), std::string::npos) << message;
    EXPECT_NE(message.find("late or gone"), std::string::npos) << message;
  }
  world_.barrier();
}

}  // namespace
}  // namespace regroup
