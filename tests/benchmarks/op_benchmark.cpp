// Bytes a second of every op of the case tables, at the shapes of T5 1.1 small with a batch of 8 x (512 /
// 114), on all cores: `op_benchmark --benchmark_filter=rms_norm`. The bytes are those of the arguments, each
// counted once, accumulated ones twice; GFLOP/s where the op counts operations.
#include <benchmark/benchmark.h>

#include "kernels/make_backend.h"
#include "tests/kernels/activation_cases.h"
#include "tests/kernels/cross_entropy_cases.h"
#include "tests/kernels/embedding_cases.h"
#include "tests/kernels/memory_cases.h"
#include "tests/kernels/norm_cases.h"
#include "tests/kernels/optimizer_cases.h"

namespace regroup::test {
namespace {

constexpr index_t kTokens = 4096, kTargets = 912, kModel = 512, kInner = 1024, kVocabulary = 32128;

std::vector<OpCase> benchmark_cases() {
  return {copy_case({kTokens, kModel}, 0, 0),
          cast_case(kVocabulary * kModel, Element::kStatistic, Element::kCompute),
          add_case(kTokens, kModel, 0),
          rms_norm_case(kTokens, kModel),
          rms_norm_backward_case(kTokens, kModel, Residual::kInPlace),
          gated_gelu_case(kTokens, kInner, 0),
          gated_gelu_case(kTokens, kInner, 0.1),
          gated_gelu_backward_case(kTokens, kInner, 0),
          relu_case(kTokens, kInner, 0),
          relu_backward_case(kTokens, kInner, 0),
          dropout_add_case(kTokens, kModel, 0, DropoutUse::kResidual),
          dropout_add_case(kTokens, kModel, 0.1, DropoutUse::kResidual),
          embedding_case(kTokens, kVocabulary, kModel, 0),
          embedding_backward_case(kTokens, kVocabulary, kModel, 0),
          relative_bias_case(512, 512, 6, true),
          relative_bias_backward_case(512, 512, 6, true),
          cross_entropy_max_case(kTargets, kVocabulary),
          cross_entropy_sums_case(kTargets, kVocabulary),
          cross_entropy_backward_case(kTargets, kVocabulary / 2, kVocabulary / 2, 1e-4),
          adafactor_factored_case(kVocabulary, kModel),
          adafactor_full_case(kModel, 64),
          adamw_case(kVocabulary, kModel, false, false)};
}

// Bytes that a call must at least move.
double bytes_of(const OpCase& op, DType compute) {
  double bytes = 0;
  for (const Argument& argument : op.arguments) {
    const double size =
        static_cast<double>(count(argument.shape) * size_of(dtype_of(argument.element, compute)));
    bytes += argument.role == Role::kAccumulated ? 2 * size : size;
  }
  return bytes;
}

void run(benchmark::State& state, const OpCase& op, DType compute) {
  const auto owned = make_backend({});
  Backend& backend = *owned;
  Instance instance(backend, op, compute);
  instance.call();  // sizes the work areas
  const double flops = backend.flops();
  for (auto _ : state) instance.call();
  using benchmark::Counter;
  state.counters["bytes"] =
      Counter(bytes_of(op, compute), Counter::kIsIterationInvariantRate, Counter::kIs1000);
  if (flops > 0)
    state.counters["flops"] = Counter(flops, Counter::kIsIterationInvariantRate, Counter::kIs1000);
}

void register_cases() {
  for (OpCase op : benchmark_cases()) {
    for (Argument& argument : op.arguments) {
      // Millions of normal numbers take longer to draw than all the measuring; speed does not ask for them.
      if (count(argument.shape) > (index_t{1} << 20)) argument.values = constant(0.01);
    }
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      benchmark::RegisterBenchmark(fmt::format("{}/{}", op.name, name_of(dtype)).c_str(),
                                   [op, dtype](benchmark::State& state) { run(state, op, dtype); })
          ->Unit(benchmark::kMicrosecond)
          ->UseRealTime();
    }
  }
}

}  // namespace
}  // namespace regroup::test

int main(int argc, char** argv) {
  regroup::test::register_cases();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
