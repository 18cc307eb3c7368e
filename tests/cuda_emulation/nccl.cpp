// NCCL between processes of one host, each with an emulated GPU: through shared memory, in the streams'
// order. A collective whose peers do not come stays in its stream, as on real GPUs. Sums in the order of the
// ranks.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <nccl.h>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <mpi.h>

#include "kernels/dtype.h"
#include "tests/cuda_emulation/device.h"
#include "tests/cuda_emulation/streams.h"

using regroup::emulation::Device;

namespace {

constexpr int kMostRanks = 8;
// Pages that nobody touches are not there. A collective has one piece, so that a rank whose values have
// arrived is needed no more.
constexpr std::size_t kPieceBytes = std::size_t{256} << 20;

// What the ranks share, zero at the beginning. A collective has a number; a rank has arrived when its values
// are in its place, and left when it has read those of the others.
struct Meeting {
  std::atomic<int> attached;
  std::array<std::atomic<std::uint64_t>, kMostRanks> arrived, left;
  std::byte values[kMostRanks][kPieceBytes];
};

struct Collective {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::size_t bytes = 0;
  ncclDataType_t type = ncclFloat32;
  ncclRedOp_t op = ncclSum;
  int root = -1;  // of a broadcast; -1: a sum
};

template <class T>
auto widened(T value) {
  if constexpr (std::is_same_v<T, regroup::bfloat16>) {
    return static_cast<float>(value);
  } else {
    return value;
  }
}

template <class T>
void reduce(const Meeting& meeting, int ranks, const Collective& work, std::byte* to, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += sizeof(T)) {
    T value;
    std::memcpy(&value, meeting.values[0] + at, sizeof(T));
    auto total = widened(value);
    for (int rank = 1; rank < ranks; ++rank) {
      std::memcpy(&value, meeting.values[rank] + at, sizeof(T));
      const auto next = widened(value);
      total = work.op == ncclSum   ? total + next
              : work.op == ncclMax ? std::max(total, next)
                                   : std::min(total, next);
    }
    value = T(total);
    std::memcpy(to + at, &value, sizeof(T));
  }
}

}  // namespace

namespace {

class State {
 public:
  State(std::string name, int ranks, int rank, Meeting* meeting)
      : name_(std::move(name)), ranks_(ranks), rank_(rank), meeting_(meeting) {
    ++meeting_->attached;
  }
  ~State() {
    munmap(meeting_, sizeof(Meeting));
    shm_unlink(name_.c_str());
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  bool is_complete() const { return meeting_->attached >= ranks_; }
  void abort() { aborted_ = true; }

  // Goes as far as the other ranks let it; whether it is done. `arrived` is the collective's own.
  bool progress(const Collective& work, bool& arrived) {
    if (aborted_) return true;
    const regroup::emulation::Device::Access access(regroup::emulation::device());
    if (!arrived) {
      if (!is_complete() || !all_at_least(meeting_->left, done_)) return false;
      std::memcpy(meeting_->values[rank_], work.from, work.bytes);
      meeting_->arrived[static_cast<std::size_t>(rank_)] = done_ + 1;
      arrived = true;
    }
    if (!all_at_least(meeting_->arrived, done_ + 1)) return false;
    finish(work);
    meeting_->left[static_cast<std::size_t>(rank_)] = ++done_;
    return true;
  }

 private:
  bool all_at_least(const std::array<std::atomic<std::uint64_t>, kMostRanks>& counts,
                    std::uint64_t number) const {
    return std::all_of(counts.begin(), counts.begin() + ranks_,
                       [&](const auto& count) { return count >= number; });
  }
  void finish(const Collective& work) const {
    if (work.root >= 0) {
      std::memcpy(work.to, meeting_->values[work.root], work.bytes);
    } else if (work.type == ncclFloat64) {
      reduce<double>(*meeting_, ranks_, work, work.to, work.bytes);
    } else if (work.type == ncclFloat32) {
      reduce<float>(*meeting_, ranks_, work, work.to, work.bytes);
    } else if (work.type == ncclBfloat16) {
      reduce<regroup::bfloat16>(*meeting_, ranks_, work, work.to, work.bytes);
    } else {
      reduce<std::int32_t>(*meeting_, ranks_, work, work.to, work.bytes);
    }
  }

  std::string name_;
  int ranks_, rank_;
  Meeting* meeting_;
  std::uint64_t done_ = 0;
  bool aborted_ = false;
};

// Between ncclGroupStart() and ncclGroupEnd() nothing begins.
Device::Group& group() { return regroup::emulation::device().group(); }

}  // namespace

struct ncclComm {
  std::shared_ptr<State> state;

  ncclResult_t begin(const Collective& work, cudaStream_t stream) const {
    if (work.bytes > kPieceBytes) return ncclInvalidArgument;
    std::function<void()> issue = [owner = state, work, stream] {
      stream->stream->issue_now(
          [owner, work, arrived = false]() mutable { return owner->progress(work, arrived); });
    };
    if (group().depth > 0) {
      group().begins.push_back(std::move(issue));
    } else {
      issue();
    }
    return ncclSuccess;
  }
};

namespace {

std::size_t bytes_of(ncclDataType_t type, std::size_t count) {
  return count * (type == ncclFloat64 ? 8 : type == ncclBfloat16 ? 2 : 4);
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited or there was a network error" : "an error";
}
const char* ncclGetLastError(ncclComm_t) { return "emulated"; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  const std::string name = "/regroup-nccl-" + std::to_string(random()) + "-" + std::to_string(getpid());
  std::memset(id->internal, 0, sizeof(id->internal));
  std::memcpy(id->internal, name.data(), name.size());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* communicator, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t*) {
  if (ranks > kMostRanks) return ncclInvalidArgument;
  const int file = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Meeting)) != 0) return ncclSystemError;
  void* const memory = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return ncclSystemError;
  auto state = std::make_shared<State>(id.internal, ranks, rank, static_cast<Meeting*>(memory));
  while (!state->is_complete()) std::this_thread::yield();
  *communicator = std::make_unique<ncclComm>(ncclComm{std::move(state)}).release();
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* state) {
  *state = ncclSuccess;
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  regroup::emulation::refuse_while_unwinding("ncclCommDestroy");
  const std::unique_ptr<ncclComm> owned(communicator);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t communicator) {
  communicator->state->abort();
  return ncclCommDestroy(communicator);
}

ncclResult_t ncclAllReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t communicator, cudaStream_t stream) {
  return communicator->begin({.from = static_cast<const std::byte*>(from),
                              .to = static_cast<std::byte*>(to),
                              .bytes = bytes_of(type, count),
                              .type = type,
                              .op = op},
                             stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t type, int root,
                           ncclComm_t communicator, cudaStream_t stream) {
  return communicator->begin({.from = static_cast<const std::byte*>(from),
                              .to = static_cast<std::byte*>(to),
                              .bytes = bytes_of(type, count),
                              .type = type,
                              .root = root},
                             stream);
}

ncclResult_t ncclGroupStart() {
  ++group().depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (--group().depth > 0) return ncclSuccess;
  for (const auto& begin : std::exchange(group().begins, {})) begin();
  return ncclSuccess;
}

// ---- A rank that waits in MPI leaves nothing undone on its GPU that others wait for there: a real GPU works
// on.

int MPI_Barrier(MPI_Comm comm) {
  regroup::emulation::run_all_streams();
  return PMPI_Barrier(comm);
}
int MPI_Bcast(void* buffer, int count, MPI_Datatype type, int root, MPI_Comm comm) {
  regroup::emulation::run_all_streams();
  return PMPI_Bcast(buffer, count, type, root, comm);
}
int MPI_Allreduce(const void* from, void* to, int count, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
  regroup::emulation::run_all_streams();
  return PMPI_Allreduce(from, to, count, type, op, comm);
}
int MPI_Allgather(const void* from, int count, MPI_Datatype type, void* to, int to_count,
                  MPI_Datatype to_type, MPI_Comm comm) {
  regroup::emulation::run_all_streams();
  return PMPI_Allgather(from, count, type, to, to_count, to_type, comm);
}
int MPI_Allgatherv(const void* from, int count, MPI_Datatype type, void* to, const int counts[],
                   const int starts[], MPI_Datatype to_type, MPI_Comm comm) {
  regroup::emulation::run_all_streams();
  return PMPI_Allgatherv(from, count, type, to, counts, starts, to_type, comm);
}
int MPI_Alltoallv(const void* from, const int counts[], const int starts[], MPI_Datatype type, void* to,
                  const int to_counts[], const int to_starts[], MPI_Datatype to_type, MPI_Comm comm) {
  regroup::emulation::run_all_streams();
  return PMPI_Alltoallv(from, counts, starts, type, to, to_counts, to_starts, to_type, comm);
}
int MPI_Comm_split(MPI_Comm comm, int color, int key, MPI_Comm* part) {
  regroup::emulation::run_all_streams();
  return PMPI_Comm_split(comm, color, key, part);
}

}  // extern "C"
