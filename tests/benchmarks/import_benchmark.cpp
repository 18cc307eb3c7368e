// Reads a foreign checkpoint into a layout, converted to fewer key/value groups on the way, and prints
// seconds and memory as JSON.
//   mpirun -n 2 import_benchmark model=DIR groups=8
// import_benchmark.py makes the checkpoint and compares with dd.
#include <chrono>
#include <fstream>

#include "kernels/make_backend.h"
#include "trainer/run/checkpoint_source.h"

namespace regroup {
namespace {

struct Asked {
  std::filesystem::path model;
  index_t groups = 0;
};

Asked parse(const std::vector<std::string>& arguments) {
  Asked asked;
  for (const std::string& argument : arguments) {
    if (argument.starts_with("model=")) {
      asked.model = argument.substr(6);
    } else if (argument.starts_with("groups=")) {
      asked.groups = std::stol(argument.substr(7));
    } else {
      throw UserError("{} is none of model, groups, as name=value", argument);
    }
  }
  return asked;
}

// The most memory that this process has had, bytes.
double peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) * 1024;
  }
  throw SystemError("/proc/self/status does not say how much memory there was");
}

// What plan_conversion() plans for --pooling mean, without measuring what is lost.
ConversionPlan mean_of_neighbours(const ModelConfig& parent, const ModelConfig& target) {
  ConversionPlan plan{.target = target};
  const std::vector<AttentionSite> from = attention_sites(parent), to = attention_sites(target);
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (from[i].kv_groups == to[i].kv_groups) continue;
    SiteConversion site{.parent = from[i], .target = to[i], .query_heads = parent.num_heads};
    for (index_t head = 0; head < from[i].kv_groups; ++head) site.order.push_back(head);
    plan.sites.push_back(std::move(site));
  }
  return plan;
}

void run(const Asked& asked) {
  const ProcessGroup world = ProcessGroup::world();
  const Layout layout = {.data_parallel = 1, .tensor_parallel = world.size()};
  const auto backend = make_backend({.device = DeviceKind::kCpu, .threads = 1});
  const double before = peak_memory();
  const CheckpointSource source = find_checkpoint(world, asked.model);
  ModelConfig target = source.config;
  target.kv_groups = asked.groups;
  const Mesh mesh(world, layout, target.all_kv_groups());
  ParameterStore store(*backend, target,
                       {.tp_rank = world.rank(), .tp_size = world.size(), .gradients = false});
  const ConversionPlan plan = mean_of_neighbours(source.config, target);
  world.barrier();
  const auto began = std::chrono::steady_clock::now();
  load_weights(world, source, *backend, store, plan);
  world.barrier();
  std::array<double, 3> most = {
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(), peak_memory() - before,
      static_cast<double>(store.all_masters().bytes())};
  world.all_reduce(most, ReduceOp::kMax);
  if (world.rank() != 0) return;
  fmt::print("{{\"seconds\": {:.4f}, \"peak\": {:.0f}, \"kept\": {:.0f}}}\n", most[0], most[1], most[2]);
}

}  // namespace
}  // namespace regroup

int main(int argc, char** argv) {
  const regroup::MpiEnvironment mpi;
  try {
    regroup::run(regroup::parse(std::vector<std::string>(argv + 1, argv + argc)));
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    mpi.abort(1);
  }
}
