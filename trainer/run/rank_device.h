// The device of a rank, and how its tensors travel to the other ranks.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/base/log.h"
#include "parallel/mesh.h"
#include "trainer/options.h"

namespace regroup {

struct RankDevice {
  std::unique_ptr<Backend> backend;
  CommunicatorFactory communicators;  // for this backend, which outlives what they make
};

// Opens the device that --device, --threads and --deterministic ask for: a CUDA rank takes the GPU of its
// number among the ranks of its host. Tensors travel by NCCL where every rank has a GPU to itself, else
// through host memory; --collectives insists on one. Logs which rank has which GPU. Collective; UserError on
// every rank where it cannot be.
RankDevice open_device(const Options& options, const ProcessGroup& world, const Log& log);

// The name of the processor level that ops run at; "" on a GPU.
std::string processor_level(const Options& options);

// Bytes a second of sums of 64 MiB over the ranks of a communicator, measured. Collective over them.
double measure_all_reduce(Backend& backend, Communicator& communicator);

// Logs of each axis of several ranks how its tensors travel and how fast: bytes a second of a 64 MiB sum,
// measured. Collective.
void log_links(Backend& backend, const Mesh& mesh, const Log& log);

}  // namespace regroup
