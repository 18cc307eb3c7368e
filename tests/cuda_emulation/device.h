// The memory of the emulated device and the limits of its kernels.
#pragma once

#include <cstddef>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <vector>

#include "tests/cuda_emulation/guarded_memory.h"

namespace regroup::emulation {

class Stream;  // streams.h

class Device {
 public:
  static constexpr std::size_t kMemoryBytes = std::size_t{4} << 30;
  static constexpr std::size_t kDefaultSharedBytes = 48 << 10;
  static constexpr std::size_t kLargeBytes = 1 << 20;  // to change a page's protection takes its time

  // Memory that only kernels, copies and cuBLAS may touch: everybody else crashes, at once or, where it is of
  // more than kLargeBytes, from the next wait on. Full of NaN unless large. Null where kMemoryBytes are in
  // use.
  void* allocate(std::size_t bytes);
  // Memory of the host, which everybody may touch.
  void* allocate_pinned(std::size_t bytes);
  // False where `address` is not the begin of such memory.
  bool free(void* address);
  bool free_pinned(void* address);

  std::size_t used() const { return used_; }
  // Whether all of these bytes are device memory.
  bool contains(const void* address, std::size_t bytes) const;
  bool contains_pinned(const void* address, std::size_t bytes) const;

  // The most shared memory of a block: Hopper's 227 KiB, or what the environment says in
  // REGROUP_EMULATED_SHARED_BYTES.
  static std::size_t most_shared();
  void allow_shared(const void* kernel, std::size_t bytes) { shared_bytes_[kernel] = bytes; }
  std::size_t allowed_shared(const void* kernel) const;

  // The host has waited for the device.
  void wait();
  // A new stream, with a number of its own, and all that were made: what is in one runs on when it is
  // destroyed.
  std::shared_ptr<Stream> make_stream();
  const std::vector<std::shared_ptr<Stream>>& streams() const { return streams_; }

  // What NCCL was told between ncclGroupStart() and ncclGroupEnd().
  struct Group {
    int depth = 0;
    std::vector<std::function<void()>> begins;
  };
  Group& group() { return group_; }

  // While one exists, device memory may be touched: all of it, or the blocks that contain `addresses` (those
  // that are device memory).
  class Access {
   public:
    explicit Access(Device& device);
    Access(Device& device, std::initializer_list<const void*> addresses);
    ~Access();
    Access(const Access&) = delete;
    Access& operator=(const Access&) = delete;

   private:
    std::vector<GuardedMemory*> blocks_;
  };

 private:
  using Blocks = std::map<const void*, std::unique_ptr<GuardedMemory>>;
  GuardedMemory* find(const void* address) const;  // the device memory it is in, or null
  static GuardedMemory* find(const Blocks& blocks, const void* address);
  static bool contains(const Blocks& blocks, const void* address, std::size_t bytes);

  Blocks device_, pinned_;
  std::size_t used_ = 0;
  std::map<const void*, std::size_t> shared_bytes_;
  std::vector<std::shared_ptr<Stream>> streams_;
  Group group_;
};

// The one device there is.
Device& device();

// Ends the process where an exception unwinds the stack: on a GPU that hangs, such a call would never return.
void refuse_while_unwinding(const char* call);

}  // namespace regroup::emulation
