// Every attention kernel on one GPU, on T5's self-attention with a trainable bias: forward and backward one
// JSON line each, as pytorch_attention.py prints them. TFLOP/s counts 2 products forward and 4 backward, not
// what backward recomputes.
#include <chrono>
#include <functional>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cudnn_attention.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/flash_attention_wgmma.h"

namespace regroup {
namespace {

constexpr index_t kHeadSize = 64, kTokensOfBatch = 32768;

// Tensors of one call, filled with numbers of the usual size.
class Tensors {
 public:
  Tensors(CudaBackend& backend, index_t tokens, index_t heads, index_t groups) : backend_(backend) {
    const index_t batch = kTokensOfBatch / tokens;
    call.q = make(DType::kBFloat16, {batch, tokens, heads, kHeadSize});
    call.k = make(DType::kBFloat16, {batch, tokens, groups, kHeadSize});
    call.v = make(DType::kBFloat16, {batch, tokens, groups, kHeadSize});
    call.bias = make(DType::kFloat32, {heads, 2 * tokens - 1});
    call.out = make(DType::kBFloat16, {batch, tokens, heads, kHeadSize});
    call.log_sum_exp = make(DType::kFloat32, {batch, heads, tokens});
    gradients.dout = make(DType::kBFloat16, {batch, tokens, heads, kHeadSize});
    gradients.dq = make(DType::kBFloat16, {batch, tokens, heads, kHeadSize});
    gradients.dk = make(DType::kBFloat16, {batch, tokens, groups, kHeadSize});
    gradients.dv = make(DType::kBFloat16, {batch, tokens, groups, kHeadSize});
    gradients.dbias = make(DType::kFloat32, {heads, 2 * tokens - 1});
  }
  AttentionCall call;
  AttentionGradients gradients;

 private:
  Tensor make(DType dtype, std::initializer_list<index_t> shape) {
    Tensor x(nullptr, dtype, shape);
    memory_.push_back(backend_.allocate(x.bytes()));
    x.data = memory_.back().data();
    dispatch(dtype, [&]<class T>() {
      std::vector<T> host(static_cast<std::size_t>(x.numel()));
      std::uint32_t state = static_cast<std::uint32_t>(memory_.size());
      for (T& value : host) {
        state = state * 1664525 + 1013904223;
        value = T(static_cast<float>(state >> 8) * 0x1p-24F - 0.5F);
      }
      backend_.copy_from_host(host.data(), x);
    });
    return x;
  }

  CudaBackend& backend_;
  std::vector<Buffer> memory_;
};

double seconds_of(Backend& backend, const std::function<void()>& work) {
  constexpr int kRuns = 10;
  work();
  backend.synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int run = 0; run < kRuns; ++run) work();
  backend.synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / kRuns;
}

void measure(CudaBackend& backend, index_t tokens, index_t heads, index_t groups) {
  Tensors t(backend, tokens, heads, groups);
  const auto report = [&](const char* kernel, const char* direction, int products,
                          const std::function<void()>& work) {
    const double flops = products * 2.0 * static_cast<double>(kTokensOfBatch * heads * tokens * kHeadSize);
    fmt::print(
        "{{\"tokens\": {}, \"heads\": {}, \"groups\": {}, \"kernel\": \"{}\", \"{}_tflops\": {:.1f}}}\n",
        tokens, heads, groups, kernel, direction, flops / seconds_of(backend, work) * 1e-12);
  };
  const auto forward = [&](const char* kernel, const std::function<void()>& work) {
    report(kernel, "forward", 2, work);
  };
  const auto backward = [&](const char* kernel, const std::function<void()>& work) {
    report(kernel, "backward", 4, work);
  };
  CudaDevice& device = backend.device();
  if (flash_attention_supports(device, t.call)) {
    forward("Regroup, flash", [&] { flash_attention_forward(device, t.call); });
  }
  if (wgmma_attention_supports(device, t.call)) {
    forward("Regroup, wgmma", [&] { wgmma_attention_forward(device, t.call); });
  }
  if (flash_attention_supports(device, t.call, t.gradients)) {
    backward("Regroup, flash", [&] { flash_attention_backward(device, t.call, t.gradients); });
  }
  const auto cudnn = make_cudnn_attention(device, Log());
  if (cudnn == nullptr) return;
  if (cudnn->supports(t.call)) forward("cuDNN", [&] { cudnn->forward(t.call); });
  if (cudnn->supports(t.call, t.gradients)) {
    backward("cuDNN", [&] { cudnn->backward(t.call, t.gradients); });
  }
}

void run() {
  CudaBackend backend(0, /*deterministic=*/false);
  for (const index_t tokens : {512, 2048}) {
    for (const index_t heads : {8, 16, 64}) {
      measure(backend, tokens, heads, heads);
      if (heads > 8) measure(backend, tokens, heads, 8);
      measure(backend, tokens, heads, 1);
    }
  }
}

}  // namespace
}  // namespace regroup

int main() {
  try {
    regroup::run();
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
