#include "parallel/nccl_communicator.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <nccl.h>
#include <type_traits>
#include <utility>

#include "kernels/cuda/cuda_backend.h"

namespace regroup {
namespace {

void check_nccl(ncclResult_t result, const char* call) {
  if (result != ncclSuccess)
    throw SystemError("{} failed: {} ({})", call, ncclGetErrorString(result), ncclGetLastError(nullptr));
}

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ncclFloat64;
    case DType::kFloat32:
      return ncclFloat32;
    case DType::kBFloat16:
      return ncclBfloat16;
    case DType::kInt32:
      return ncclInt32;
  }
  throw InternalError("unknown dtype {}", static_cast<int>(dtype));
}

ncclRedOp_t nccl_op(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return ncclSum;
    case ReduceOp::kMax:
      return ncclMax;
    case ReduceOp::kMin:
      return ncclMin;
  }
  throw InternalError("unknown reduction {}", static_cast<int>(op));
}

// Waits for the other ranks, who may never come while an exception unwinds this one.
struct ReleaseCommunicator {
  void operator()(ncclComm_t communicator) const noexcept {
    if (!is_unwinding()) ncclCommDestroy(communicator);
  }
};

// Sets a variable of the environment unless the user has.
void set_default(const char* variable, const char* value) { setenv(variable, value, /*overwrite=*/0); }

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::string name, const ProcessGroup& group, CudaDevice& device,
                   const NcclOptions& options)
      : Communicator(std::move(name), group), device_(device), options_(options) {
    if (size() == 1) return;
    connect(group);
    stream_ = make_cuda_stream();
    issued_ = make_cuda_event();
    done_ = make_cuda_event();
    for (CudaEvent& event : passed_) event = make_cuda_event();
    guard_ = device_.guard_waits([this](double seconds) { watch(seconds); });
  }

  std::string transport() const override {
    int version = 0;
    check_nccl(ncclGetVersion(&version), "ncclGetVersion");
    return fmt::format("NCCL {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
  }

 private:
  // What fails here fails on this rank first: it throws at once, and main() ends the others, who wait for it.
  void connect(const ProcessGroup& group) {
    // The gradients' sums run beside others of another communicator. On the device all must run in one order,
    // which is the order of the host's calls, the same on every rank.
    set_default("NCCL_LAUNCH_ORDER_IMPLICIT", "1");
    if (options_.deterministic) {
      set_default("NCCL_NVLS_ENABLE", "0");
      setenv("NCCL_ALGO", "Ring", 1);
      setenv("NCCL_PROTO", "Simple", 1);
    }
    ncclUniqueId id{};
    if (rank() == 0) check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
    const std::string bytes = group.broadcast(std::string(id.internal, sizeof(id.internal)));
    std::memcpy(id.internal, bytes.data(), sizeof(id.internal));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.commName = name().c_str();
    const Heartbeat::Wait wait(heartbeat(), "the start of NCCL");
    ncclComm_t communicator = nullptr;
    check_nccl(ncclCommInitRankConfig(&communicator, size(), id, rank(), &config), "ncclCommInitRankConfig");
    communicator_.reset(communicator);
  }

  // SystemError naming rank, axis and the last collective. Told before the communicator is aborted, which
  // ends what it left on the device and may wait for it.
  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
    SystemError error("{} rank {} of {}, last collective {}: {}", name(), rank(), size(), last_,
                      fmt::format(format, std::forward<Args>(args)...));
    options_.log.error("{}", error.what());
    error.set_told();
    ncclCommAbort(communicator_.release());
    throw error;
  }

  void require_health(ncclResult_t state) {
    if (state == ncclSuccess) return;
    const std::string reason = ncclGetLastError(communicator_.get());
    fail("NCCL failed: {} ({})", ncclGetErrorString(state), reason);
  }

  // Called with the seconds that the host has waited for the device.
  void watch(double seconds) {
    if (communicator_ == nullptr) return;  // has failed, and said so
    ncclResult_t state = ncclSuccess;
    check_nccl(ncclCommGetAsyncError(communicator_.get(), &state), "ncclCommGetAsyncError");
    require_health(state);
    if (seconds > options_.deadline_seconds) {
      fail(
          "no end of what the device was given after {:.0f} s; a rank of the axis is late or gone, or a link "
          "is down",
          seconds);
    }
  }

  // The collective's stream goes on after what the compute stream was given so far.
  template <class Issue>
  void issue(const char* what, std::span<const Tensor> xs, Issue&& collective) {
    check(communicator_ != nullptr, "{} of {} after a failure", what, name());
    // Behind a collective that hangs the device's queue would fill up, and a launch then blocks where nobody
    // watches.
    CudaEvent& passed = passed_[static_cast<std::size_t>(collectives_) % passed_.size()];
    device_.wait_for(passed.get());
    last_ = fmt::format("number {}, {} of {}", ++collectives_, what, xs.front().describe());
    if (xs.size() > 1) last_ += fmt::format(" and {} more", xs.size() - 1);
    check_cuda(cudaEventRecord(issued_.get(), device_.stream()), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream_.get(), issued_.get(), 0), "cudaStreamWaitEvent");
    require_health(collective());
    check_cuda(cudaEventRecord(passed.get(), stream_.get()), "cudaEventRecord");
  }

  ncclResult_t begin_sum(const Tensor& x, ReduceOp op) {
    return ncclAllReduce(x.data, x.data, static_cast<std::size_t>(x.numel()), nccl_type(x.dtype), nccl_op(op),
                         communicator_.get(), stream_.get());
  }
  void do_start_all_reduce(Tensor x, ReduceOp op) override {
    issue("all_reduce", {&x, 1}, [&] { return begin_sum(x, op); });
  }
  void do_all_reduce(std::span<const Tensor> xs, ReduceOp op) override {
    issue("all_reduce", xs, [&] {
      ncclResult_t result = ncclGroupStart();
      for (const Tensor& x : xs) result = result == ncclSuccess ? begin_sum(x, op) : result;
      const ncclResult_t end = ncclGroupEnd();
      return result == ncclSuccess ? end : result;
    });
    do_finish();
  }
  void do_finish() override {
    if (size() == 1) return;
    check_cuda(cudaEventRecord(done_.get(), stream_.get()), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(device_.stream(), done_.get(), 0), "cudaStreamWaitEvent");
  }
  void do_all_reduce(Tensor x, ReduceOp op) override {
    do_start_all_reduce(x, op);
    do_finish();
  }
  void do_broadcast(Tensor x, int root) override {
    issue("broadcast", {&x, 1}, [&] {
      return ncclBroadcast(x.data, x.data, static_cast<std::size_t>(x.numel()), nccl_type(x.dtype), root,
                           communicator_.get(), stream_.get());
    });
    do_finish();
  }

  CudaDevice& device_;
  NcclOptions options_;
  CudaStream stream_;
  CudaEvent issued_, done_;
  std::array<CudaEvent, 16> passed_;  // by the stream: the last collectives
  std::unique_ptr<std::remove_pointer_t<ncclComm_t>, ReleaseCommunicator> communicator_;
  std::shared_ptr<const CudaDevice::WaitGuard> guard_;
  index_t collectives_ = 0;
  std::string last_ = "its start";
};

}  // namespace

bool has_nccl() { return true; }

std::unique_ptr<Communicator> make_nccl_communicator(std::string name, const ProcessGroup& group,
                                                     Backend& backend, const NcclOptions& options) {
  auto* const cuda = dynamic_cast<CudaBackend*>(&backend);
  check(cuda != nullptr, "NCCL moves tensors of CUDA backends only");
  return std::make_unique<NcclCommunicator>(std::move(name), group, cuda->device(), options);
}

}  // namespace regroup
