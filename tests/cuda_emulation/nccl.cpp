// NCCL between processes of one host, each with an emulated GPU: through shared memory, non-blocking, so that
// a collective whose peers do not come stays in progress, as on real GPUs. Sums in the order of the ranks.
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
#include <unistd.h>

#include "kernels/dtype.h"
#include "tests/cuda_emulation/device.h"

namespace {

constexpr int kMostRanks = 8;
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

// What the ranks share, zero at the beginning. A piece of a collective has a number; a rank has arrived when
// its values are in its place, and left when it has read those of the others.
struct Meeting {
  std::atomic<int> attached;
  std::atomic<bool> aborted;
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

struct ncclComm {
  std::string name;
  int ranks = 0, rank = 0;
  Meeting* meeting = nullptr;
  bool settled = false;      // all ranks are attached
  std::uint64_t pieces = 0;  // done
  bool written = false;      // this rank's values of piece `pieces` + 1 are in their place
  Collective work;

  ~ncclComm() {
    munmap(meeting, sizeof(Meeting));
    shm_unlink(name.c_str());
  }

  bool all_at_least(const std::array<std::atomic<std::uint64_t>, kMostRanks>& counts,
                    std::uint64_t number) const {
    return std::all_of(counts.begin(), counts.begin() + ranks,
                       [&](const auto& count) { return count >= number; });
  }

  // Goes as far as the other ranks let it.
  ncclResult_t progress() {
    if (meeting->aborted) return ncclRemoteError;
    if (!settled) {
      if (meeting->attached < ranks) return ncclInProgress;
      settled = true;
    }
    const regroup::emulation::Device::Access access(regroup::emulation::device());
    while (work.bytes > 0) {
      const std::size_t part = std::min(work.bytes, kPieceBytes);
      if (!written) {
        if (!all_at_least(meeting->left, pieces)) return ncclInProgress;
        std::memcpy(meeting->values[rank], work.from, part);
        meeting->arrived[static_cast<std::size_t>(rank)] = pieces + 1;
        written = true;
      }
      if (!all_at_least(meeting->arrived, pieces + 1)) return ncclInProgress;
      finish_piece(part);
      meeting->left[static_cast<std::size_t>(rank)] = ++pieces;
      written = false;
      work.from += part;
      work.to += part;
      work.bytes -= part;
    }
    return ncclSuccess;
  }

  void finish_piece(std::size_t part) const {
    if (work.root >= 0) {
      std::memcpy(work.to, meeting->values[work.root], part);
    } else if (work.type == ncclFloat64) {
      reduce<double>(*meeting, ranks, work, work.to, part);
    } else if (work.type == ncclFloat32) {
      reduce<float>(*meeting, ranks, work, work.to, part);
    } else if (work.type == ncclBfloat16) {
      reduce<regroup::bfloat16>(*meeting, ranks, work, work.to, part);
    } else {
      reduce<std::int32_t>(*meeting, ranks, work, work.to, part);
    }
  }

  ncclResult_t begin(const Collective& next) {
    if (work.bytes > 0) return ncclInvalidUsage;  // one at a time
    work = next;
    return progress();
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
  auto result = std::make_unique<ncclComm>();
  result->name = id.internal;
  result->ranks = ranks;
  result->rank = rank;
  const int file = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Meeting)) != 0) return ncclSystemError;
  void* const memory = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return ncclSystemError;
  result->meeting = static_cast<Meeting*>(memory);
  ++result->meeting->attached;
  *communicator = result.release();
  return ncclInProgress;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* state) {
  *state = communicator->progress();
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  const std::unique_ptr<ncclComm> owned(communicator);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t communicator) {
  communicator->meeting->aborted = true;
  return ncclCommDestroy(communicator);
}

ncclResult_t ncclAllReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t communicator, cudaStream_t) {
  return communicator->begin({.from = static_cast<const std::byte*>(from),
                              .to = static_cast<std::byte*>(to),
                              .bytes = bytes_of(type, count),
                              .type = type,
                              .op = op});
}
ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t type, int root,
                           ncclComm_t communicator, cudaStream_t) {
  return communicator->begin({.from = static_cast<const std::byte*>(from),
                              .to = static_cast<std::byte*>(to),
                              .bytes = bytes_of(type, count),
                              .type = type,
                              .root = root});
}

}  // extern "C"
