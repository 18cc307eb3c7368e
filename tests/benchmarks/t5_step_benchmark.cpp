// A full training step (forward, backward, Adafactor) of T5 1.1 on random tokens, as pytorch_t5.py times it.
//   t5_step_benchmark [device=cuda] [size=base] [batch=64] [kv-groups=1] [recompute=1] ...
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "kernels/make_backend.h"
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

// What may be asked for, as name=value.
struct Asked {
  std::string size = "small", device = "cpu", dtype = "bf16";
  index_t batch = 8, inputs = 512, targets = 114, kv_groups = 0, steps = 5, threads = 2, recompute = 0;
};

Asked parse(const std::vector<std::string>& arguments) {
  Asked asked;
  const std::map<std::string, std::string*> words = {
      {"size", &asked.size}, {"device", &asked.device}, {"dtype", &asked.dtype}};
  const std::map<std::string, index_t*> numbers = {
      {"batch", &asked.batch},         {"inputs", &asked.inputs}, {"targets", &asked.targets},
      {"kv-groups", &asked.kv_groups}, {"steps", &asked.steps},   {"threads", &asked.threads},
      {"recompute", &asked.recompute}};
  for (const std::string& argument : arguments) {
    const std::size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (const auto word = words.find(name); word != words.end()) {
      *word->second = value;
    } else if (const auto number = numbers.find(name); number != numbers.end()) {
      *number->second = std::stol(value);
    } else {
      throw UserError(
          "{} is none of size, device, dtype, batch, inputs, targets, kv-groups, steps, threads, "
          "recompute, as name=value",
          argument);
    }
  }
  return asked;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

void run(const Asked& asked) {
  ModelConfig config = t5_1_1(asked.size);
  if (asked.kv_groups > 0) config.kv_groups = asked.kv_groups;
  const DType dtype = asked.dtype == "fp32" ? DType::kFloat32 : DType::kBFloat16;
  const auto backend = make_backend({.device = asked.device == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu,
                                     .threads = static_cast<int>(asked.threads)});
  const double peak = measure_matmul_peak(*backend, dtype);
  const Mesh mesh =
      Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {config.kv_groups, config.num_heads});
  ModelRunner runner(*backend, mesh, config,
                     {.compute = dtype,
                      .micro_batch = asked.batch,
                      .inputs_length = asked.inputs,
                      .targets_length = asked.targets,
                      .train = true,
                      .recompute = asked.recompute != 0,
                      .z_loss = 1e-4});
  runner.parameters().initialise(1);
  Adafactor optimizer(*backend, runner.parameters(), mesh, {});
  const Batch batch = random_batch(asked.batch, asked.inputs, asked.targets, config.vocab_size);
  std::vector<double> seconds, model_seconds;
  double loss = 0;
  for (index_t step = 0; step <= asked.steps; ++step) {
    const double begin = seconds_now();
    runner.clear_gradients();
    runner.train(batch, {.step = step}, 1 / static_cast<double>(asked.batch * asked.targets));
    loss = runner.take_losses().mean();
    const double middle = seconds_now();
    optimizer.update(step, 1e-2);
    backend->synchronize();
    if (step == 0) continue;  // pays for what is set up on first use
    seconds.push_back(seconds_now() - begin);
    model_seconds.push_back(middle - begin);
  }
  const auto tokens = static_cast<double>(asked.batch * (asked.inputs + asked.targets));
  fmt::print(
      "{{\"device\": \"{}\", \"tokens_per_second\": {:.1f}, \"median_step_seconds\": {:.4f}, "
      "\"fastest_step_seconds\": {:.4f}, \"forward_backward_seconds\": {:.4f}, \"matmul_peak_gflops\": "
      "{:.1f}, "
      "\"share_of_peak\": {:.4f}, \"model_gflop_per_step\": {:.1f}, \"loss\": {:.4f}}}\n",
      backend->describe(), tokens / median(seconds), median(seconds),
      *std::min_element(seconds.begin(), seconds.end()), median(model_seconds), peak * 1e-9,
      runner.flops() / median(seconds) / peak, runner.flops() * 1e-9, loss);
}

}  // namespace
}  // namespace regroup

int main(int argc, char** argv) {
  try {
    regroup::run(regroup::parse(std::vector<std::string>(argv + 1, argv + argc)));
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
