// Saves a T5's fp32 parameters and loads them again, as a run does, and prints the seconds as JSON.
//   mpirun -n 4 checkpoint_benchmark directory=DIR [tp=4] [layers=28] [memory=MiB]
// checkpoint_benchmark.py compares them with dd.
#include <chrono>
#include <fcntl.h>
#include <unistd.h>

#include "kernels/base/file.h"
#include "kernels/make_backend.h"
#include "trainer/checkpoint/checkpoint_loader.h"
#include "trainer/checkpoint/checkpoint_writer.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

struct Asked {
  std::filesystem::path directory;
  index_t layers = 28, memory = 0;
  int tp = 1;
};

Asked parse(const std::vector<std::string>& arguments) {
  Asked asked;
  for (const std::string& argument : arguments) {
    const std::size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "directory") {
      asked.directory = value;
    } else if (name == "tp") {
      asked.tp = std::stoi(value);
    } else if (name == "layers") {
      asked.layers = std::stol(value);
    } else if (name == "memory") {
      asked.memory = std::stol(value);
    } else {
      throw UserError("{} is none of directory, tp, layers, memory, as name=value", argument);
    }
  }
  return asked;
}

// Seconds that `work` takes until all ranks have done it.
template <class Work>
double seconds_of(const ProcessGroup& world, Work&& work) {
  world.barrier();
  const auto begin = std::chrono::steady_clock::now();
  work();
  world.barrier();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// So that it is read from the disk: what is on the disk already is dropped from memory.
void forget(const std::filesystem::path& directory) {
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const int file = ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    ::close(file);
  }
}

void run(const Asked& asked) {
  const ProcessGroup world = ProcessGroup::world();
  const Layout layout = complete_layout({.data_parallel = 0, .tensor_parallel = asked.tp}, world.size());
  const auto backend = make_backend({.device = DeviceKind::kCpu, .threads = 1});
  ModelConfig config = t5_1_1("base");
  config.num_layers = config.num_decoder_layers = asked.layers;
  config.kv_groups = 4;
  TensorSet set{.stem = "model", .tensors = {}};
  const auto value_of = [](index_t i) { return static_cast<float>(i % 8191) * 1e-3F; };
  std::vector<Buffer> memory;
  for (const ParameterSpec& spec : parameter_table(config)) {
    const Slice slice = local_slice(spec.partition, spec.shape, world.rank() % asked.tp, asked.tp);
    const auto shape = local_shape(slice, spec.shape);
    index_t count = 1;
    for (const index_t extent : shape) count *= extent;
    memory.push_back(backend->allocate(count * size_of(DType::kFloat32)));
    const Tensor local = memory.back().tensor(DType::kFloat32, shape);
    for (index_t i = 0; i < count; ++i) local.as<float>()[i] = value_of(i);
    set.tensors.push_back({.name = spec.name, .shape = spec.shape, .slice = slice, .local = local});
  }
  const CheckpointStore store(world, asked.directory);
  store.prepare();
  CheckpointWriter writer(world, layout, *backend, store, {set},
                          {.memory = static_cast<std::uint64_t>(asked.memory) << 20});
  double staged = 0;
  const double saved = seconds_of(world, [&] {
    staged = seconds_of(world, [&] { writer.save(1, {{"step", 1}}, {}); });
    writer.finish();
  });
  world.run_on(0, [&] { forget(store.path_of(1)); });
  for (const ShardedTensor& tensor : set.tensors) backend->fill_zero(tensor.local);
  std::optional<std::string> damage;
  const double loaded = seconds_of(world, [&] {
    damage = load_step(world, layout, *backend, store.path_of(1), {set}, writer.idle_memory());
  });
  check(!damage, "{}", damage.value_or(""));
  for (const ShardedTensor& tensor : set.tensors) {
    const float* const values = tensor.local.as<float>();
    for (index_t i = 0; i < tensor.local.numel(); ++i) {
      check(values[i] == value_of(i), "'{}' came back with other values", tensor.name);
    }
  }
  if (world.rank() != 0) return;
  fmt::print(
      "{{\"ranks\": {}, \"tp\": {}, \"bytes\": {}, \"staged\": {:.4f}, \"saved\": {:.4f}, \"loaded\": "
      "{:.4f}}}\n",
      world.size(), asked.tp, writer.checkpoint_bytes(), staged, saved, loaded);
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
