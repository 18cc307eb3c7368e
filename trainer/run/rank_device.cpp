#include "trainer/run/rank_device.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <unistd.h>

#include "kernels/base/host.h"
#include "kernels/make_backend.h"
#include "parallel/host_staged_communicator.h"
#include "parallel/nccl_communicator.h"
#include "trainer/run/watchdog.h"

namespace regroup {
namespace {

// Whether two ranks have the same GPU. Collective.
bool ranks_share_a_device(const ProcessGroup& world, const Backend& backend) {
  std::vector<std::string> ids = world.all_gather(backend.device_id());
  std::sort(ids.begin(), ids.end());
  return std::adjacent_find(ids.begin(), ids.end()) != ids.end();
}

void log_devices(const ProcessGroup& world, const Backend& backend, const Log& log) {
  constexpr std::size_t kMostLines = 64;
  const auto lines = world.all_gather(fmt::format("on {}: {}", host_name(), backend.describe()));
  for (std::size_t rank = 0; rank < std::min(lines.size(), kMostLines); ++rank) {
    log.info("rank {} {}", rank, lines[rank]);
  }
  if (lines.size() > kMostLines) log.info("... and {} ranks more", lines.size() - kMostLines);
}

// What the processors of the ranks can do, where the run would be faster or the same everywhere if they were
// alike. Collective.
void log_processors(const Options& options, const ProcessGroup& world, const Backend& backend,
                    const Log& log) {
  const std::vector<std::string> names = world.all_gather(processor_level(options));
  const auto other =
      std::find_if(names.begin(), names.end(), [&](const auto& name) { return name != names[0]; });
  if (other != names.end() && world.rank() == 0) {
    log.warning(
        "rank {} runs at processor level {}, rank 0 at {}: they round differently, and all wait for the "
        "slowest; "
        "REGROUP_CPU_LEVEL=LEVEL makes them alike",
        other - names.begin(), *other, names[0]);
  }
  if (options.precision == "bf16" && !backend.multiplies_bfloat16()) {
    log.info(
        "this processor does not multiply bfloat16 ({}): products are made in float32, and --precision fp32 "
        "would be faster",
        backend.describe());
  }
}

}  // namespace

RankDevice open_device(const Options& options, const ProcessGroup& world, const Log& log) {
  const ProcessGroup host = world.split_by_host();
  const bool cuda = options.device == "cuda";
  RankDevice result;
  world.run_together([&] {
    result.backend = make_backend({.device = cuda ? DeviceKind::kCuda : DeviceKind::kCpu,
                                   .threads = threads_of(options.threads, host.size()),
                                   .cpu_level = options.cpu_level,
                                   .local_rank = host.rank(),
                                   .deterministic = options.deterministic});
  });
  if (!cuda) {
    log_processors(options, world, *result.backend, log);
    result.communicators = make_mpi_communicator;
    return result;
  }
  Backend& backend = *result.backend;
  log_devices(world, backend, log);
  const bool shared = ranks_share_a_device(world, backend);
  if (options.collectives == "nccl" && (shared || !has_nccl())) {
    UserError error("collectives = nccl is impossible: {}; or use --collectives host",
                    has_nccl() ? "ranks of one host share a GPU, which NCCL refuses: start one rank a GPU"
                               : "this trainer was built without NCCL");
    error.set_on_every_rank();
    throw error;
  }
  if (options.collectives == "host" || shared || !has_nccl()) {
    if (world.size() > 1)
      log.info("tensors travel through host memory{}", shared ? ": ranks share a GPU" : "");
    result.communicators = [&backend](std::string name, const ProcessGroup& group) {
      return make_host_staged_communicator(std::move(name), group, backend);
    };
    return result;
  }
  // The watchdog comes first: it says more than NCCL knows.
  constexpr double kLater = 60;
  const NcclOptions nccl{.deterministic = options.deterministic,
                         .log = log,
                         .deadline_seconds = Watchdog::bound(options.hang_timeout) + kLater};
  result.communicators = [&backend, nccl](std::string name, const ProcessGroup& group) {
    return make_nccl_communicator(std::move(name), group, backend, nccl);
  };
  return result;
}

std::string processor_level(const Options& options) {
  if (options.device != "cpu") return "";
  return std::string(name_of(options.cpu_level.value_or(highest_cpu_level())));
}

double measure_all_reduce(Backend& backend, Communicator& communicator) {
  constexpr index_t kBytes = index_t{64} << 20;
  constexpr int kRuns = 3;
  const Buffer memory = backend.allocate(kBytes);
  const Tensor x = memory.tensor(DType::kFloat32, {kBytes / size_of(DType::kFloat32)});
  communicator.all_reduce(x);  // pays for what is set up on first use
  backend.synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int run = 0; run < kRuns; ++run) communicator.all_reduce(x);
  backend.synchronize();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(kRuns * kBytes) / seconds.count();
}

void log_links(Backend& backend, const Mesh& mesh, const Log& log) {
  for (Communicator* axis : {&mesh.tp(), &mesh.dp()}) {
    if (axis->size() == 1) continue;
    const double rate = measure_all_reduce(backend, *axis);
    log.info("{}: {} ranks, {}, {:.1f} GB/s for sums of 64 MiB", axis->name(), axis->size(),
             axis->transport(), rate * 1e-9);
  }
}

}  // namespace regroup
