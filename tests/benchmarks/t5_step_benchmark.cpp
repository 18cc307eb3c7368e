// A full training step (forward, backward, Adafactor) of T5 1.1 on random tokens, as pytorch_t5.py times it.
//   t5_step_benchmark [size] [batch] [inputs] [targets] [bf16|fp32] [kv_groups] [steps] [threads]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/matmul_peak.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

Batch random_batch(index_t size, index_t inputs, index_t targets, index_t vocab_size) {
  Batch batch{.size = size, .inputs_length = inputs, .targets_length = targets};
  const Philox philox(1, RandomPurpose::kTest);
  const auto fill = [&](std::vector<std::int32_t>& ids, index_t count, std::uint64_t stream) {
    for (index_t i = 0; i < count; ++i) {
      ids.push_back(
          static_cast<std::int32_t>(2 + philox.child(stream).below(static_cast<std::uint64_t>(vocab_size - 2),
                                                                   static_cast<std::uint64_t>(i))));
    }
  };
  fill(batch.input_ids, size * inputs, 0);
  fill(batch.targets, size * targets, 1);
  return batch;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void run(const std::vector<std::string>& arguments) {
  const auto argument = [&](std::size_t i, const char* otherwise) {
    return i < arguments.size() ? arguments[i] : std::string(otherwise);
  };
  const auto number = [&](std::size_t i, const char* otherwise) { return std::stol(argument(i, otherwise)); };
  ModelConfig config = t5_1_1(argument(0, "small"));
  const index_t size = number(1, "8"), inputs = number(2, "512"), targets = number(3, "114");
  const DType dtype = argument(4, "bf16") == "fp32" ? DType::kFloat32 : DType::kBFloat16;
  config.kv_groups = number(5, std::to_string(config.num_heads).c_str());
  const index_t steps = number(6, "5");
  CpuBackend backend(static_cast<int>(number(7, "2")));
  const Mesh mesh =
      Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {config.kv_groups, config.num_heads});
  ModelRunner runner(backend, mesh, config,
                     {.compute = dtype,
                      .micro_batch = size,
                      .inputs_length = inputs,
                      .targets_length = targets,
                      .train = true,
                      .z_loss = 1e-4});
  runner.parameters().initialise(1);
  Adafactor optimizer(backend, runner.parameters(), mesh, {});
  const Batch batch = random_batch(size, inputs, targets, config.vocab_size);
  std::vector<double> seconds, model_seconds;
  double loss = 0;
  for (index_t step = 0; step <= steps; ++step) {
    const double begin = seconds_now();
    runner.clear_gradients();
    runner.train(batch, {.step = step}, 1 / static_cast<double>(size * targets));
    loss = runner.take_losses().mean();
    const double middle = seconds_now();
    optimizer.update(step, 1e-2);
    if (step == 0) continue;  // pays for what is set up on first use
    seconds.push_back(seconds_now() - begin);
    model_seconds.push_back(middle - begin);
  }
  const double peak = measure_matmul_peak(backend, dtype);
  const auto median = [](std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                     values.end());
    return values[values.size() / 2];
  };
  const auto tokens = static_cast<double>(size * (inputs + targets));
  fmt::print(
      "{{\"tokens_per_second\": {:.1f}, \"median_step_seconds\": {:.4f}, \"fastest_step_seconds\": {:.4f}, "
      "\"forward_backward_seconds\": {:.4f}, \"matmul_peak_gflops\": {:.1f}, \"share_of_peak\": {:.4f}, "
      "\"model_gflop_per_step\": {:.1f}, \"loss\": {:.4f}}}\n",
      tokens / median(seconds), median(seconds), *std::min_element(seconds.begin(), seconds.end()),
      median(model_seconds), peak * 1e-9, runner.flops() / median(seconds) / peak, runner.flops() * 1e-9,
      loss);
}

}  // namespace
}  // namespace regroup

int main(int argc, char** argv) {
  try {
    regroup::run(std::vector<std::string>(argv + 1, argv + argc));
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
