#include "tests/cuda_emulation/streams.h"

#include <thread>
#include <utility>
#include <vector>

#include "tests/cuda_emulation/device.h"

using regroup::emulation::Device;
using regroup::emulation::device;
using regroup::emulation::refuse_while_unwinding;
using regroup::emulation::run_all_streams;
using regroup::emulation::Stream;
using regroup::emulation::stream_of;

struct CUevent_st {
  std::shared_ptr<Stream> stream;  // null: not recorded, or of the default stream
  std::uint64_t count = 0;         // of the stream's work that came before

  bool is_reached() const { return stream == nullptr || stream->reach(count); }
};

namespace regroup::emulation {
namespace {

bool coin(std::uint64_t stream, std::uint64_t piece) {
  std::uint64_t x = stream * 0x9E3779B97F4A7C15 + piece * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 31) * 0x94D049BB133111EB;
  return (x >> 40 & 1) != 0;
}

}  // namespace

void Stream::issue(Work work) {
  queue_.push_back(std::move(work));
  if (coin(number_, issued_++)) reach(issued_);
}

void Stream::issue_now(Work work) {
  queue_.push_back(std::move(work));
  reach(++issued_);
}

bool Stream::reach(std::uint64_t count) {
  while (done_ < count) {
    bool is_done = true;  // also where it throws
    try {
      is_done = queue_.front()();
    } catch (...) {
      queue_.pop_front();
      ++done_;
      throw;
    }
    if (!is_done) return false;
    queue_.pop_front();
    ++done_;
  }
  return true;
}

std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
  return handle == nullptr ? nullptr : handle->stream;
}

void issue(cudaStream_t handle, std::function<void()> work) {
  if (handle == nullptr) return work();
  handle->stream->issue([work = std::move(work)] {
    work();
    return true;
  });
}

void run_all_streams() {
  for (;;) {
    bool done = true;
    for (const auto& stream : device().streams()) done = stream->reach(stream->issued()) && done;
    if (done) return;
    std::this_thread::yield();
  }
}

}  // namespace regroup::emulation

extern "C" {

cudaError_t cudaDeviceSynchronize() {
  run_all_streams();
  device().wait();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned) {
  *handle = std::make_unique<CUstream_st>(CUstream_st{device().make_stream()}).release();
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  refuse_while_unwinding("cudaStreamDestroy");
  const std::unique_ptr<CUstream_st> owned(handle);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const auto stream = stream_of(handle);
  return stream == nullptr || stream->reach(stream->issued()) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  while (cudaStreamQuery(handle) != cudaSuccess) std::this_thread::yield();
  device().wait();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  // Of the event as it is now: it may be recorded again before the wait comes.
  if (handle != nullptr) handle->stream->issue([moment = *event] { return moment.is_reached(); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = std::make_unique<CUevent_st>().release();
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  refuse_while_unwinding("cudaEventDestroy");
  std::unique_ptr<CUevent_st> owned(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  event->stream = stream_of(handle);
  event->count = event->stream == nullptr ? 0 : event->stream->issued();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->is_reached() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  while (!event->is_reached()) std::this_thread::yield();
  device().wait();
  return cudaSuccess;
}
// Everything takes a millisecond.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

}  // extern "C"
