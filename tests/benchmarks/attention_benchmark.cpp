// Attention of T5 1.1 small's layers: FLOP/s and the share of the matmul peak measured in the same run.
// Products over the visible scores count (forward 2, backward 4), what backward recomputes does not.
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "kernels/make_backend.h"
#include "kernels/matmul_peak.h"

namespace regroup {
namespace {

struct Layer {
  const char* name;
  index_t samples, queries, keys, heads, groups, size;
  bool bias, causal;
  double dropout = 0;
};

constexpr Layer kLayers[] = {{"encoder", 8, 512, 512, 6, 6, 64, true, false},
                             {"decoder", 8, 114, 114, 6, 6, 64, true, true},
                             {"cross", 8, 114, 512, 6, 6, 64, false, false},
                             {"cross_mqa", 8, 114, 512, 6, 1, 64, false, false},
                             {"long_causal", 1, 2048, 2048, 6, 2, 64, true, true},
                             {"encoder_dropout", 8, 512, 512, 6, 6, 64, true, false, 0.1}};

// A layer's tensors, filled with numbers of the usual size.
class Tensors {
 public:
  Tensors(Backend& backend, const Layer& l, DType dtype) : backend_(backend) {
    const DType statistic = stat_dtype(dtype);
    for (Tensor* x : {&q, &dq, &out, &dout}) *x = make(dtype, {l.samples, l.queries, l.heads, l.size});
    for (Tensor* x : {&k, &v, &dk, &dv}) *x = make(dtype, {l.samples, l.keys, l.groups, l.size});
    log_sum_exp = make(statistic, {l.samples, l.heads, l.queries});
    if (l.bias) {
      bias = make(statistic, {l.heads, l.queries + l.keys - 1});
      dbias = make(statistic, {l.heads, l.queries + l.keys - 1});
    }
  }
  Tensor q, k, v, bias, out, log_sum_exp, dout, dq, dk, dv, dbias;

 private:
  Tensor make(DType dtype, std::initializer_list<index_t> shape) {
    Tensor x(nullptr, dtype, shape);
    memory_.push_back(backend_.allocate(x.bytes()));
    x.data = memory_.back().data();
    const Philox random(1, RandomPurpose::kTest, memory_.size());
    dispatch(dtype, [&]<class T>() {
      std::vector<T> host(static_cast<std::size_t>(x.numel()));
      for (std::size_t i = 0; i < host.size(); ++i) host[i] = T(static_cast<float>(random.uniform(i) - 0.5));
      backend_.copy_from_host(host.data(), x);
    });
    return x;
  }

  Backend& backend_;
  std::vector<Buffer> memory_;
};

void run(benchmark::State& state, const Layer& layer, DType dtype, double peak, bool backward) {
  const auto owned = make_backend({});
  Backend& backend = *owned;
  const Tensors t(backend, layer, dtype);
  const AttentionOptions options{
      .causal = layer.causal, .dropout_rate = layer.dropout, .dropout_key = {}, .heads = layer.heads};
  backend.attention(t.q, t.k, t.v, t.bias, {}, t.out, t.log_sum_exp, options);
  const double before = backend.flops();
  for (auto _ : state) {
    if (backward) {
      backend.attention_backward(t.dout, t.q, t.k, t.v, t.bias, {}, t.out, t.log_sum_exp, t.dq, t.dk, t.dv,
                                 t.dbias, options);
    } else {
      backend.attention(t.q, t.k, t.v, t.bias, {}, t.out, t.log_sum_exp, options);
    }
  }
  const double flops = backend.flops() - before;
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsRate);
  state.counters["share_of_peak"] = benchmark::Counter(flops / peak, benchmark::Counter::kIsRate);
}

void register_all() {
  const auto owned = make_backend({});
  Backend& backend = *owned;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    const double peak = measure_matmul_peak(backend, dtype);
    for (const Layer& layer : kLayers) {
      for (const bool backward : {false, true}) {
        const std::string name =
            fmt::format("attention{}/{}/{}", backward ? "_backward" : "", layer.name, name_of(dtype));
        benchmark::RegisterBenchmark(name.c_str(), run, layer, dtype, peak, backward)
            ->Unit(benchmark::kMillisecond)
            ->UseRealTime();
      }
    }
    benchmark::AddCustomContext(fmt::format("matmul peak {}", name_of(dtype)),
                                fmt::format("{:.1f} GFLOP/s", peak * 1e-9));
  }
}

}  // namespace
}  // namespace regroup

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  regroup::register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
