#include "kernels/cuda/attention_choice.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include "kernels/base/json.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/flash_attention_wgmma.h"
#include "kernels/cuda/simple_attention.h"
#include "kernels/cuda/stopwatch.h"

namespace regroup {
namespace {

constexpr std::array kNames = {std::pair{AttentionKernel::kFlash, std::string_view("flash")},
                               std::pair{AttentionKernel::kWgmma, std::string_view("wgmma")},
                               std::pair{AttentionKernel::kCudnn, std::string_view("cuDNN")}};
constexpr const char* kLogSumExp = "log_sum_exp";
constexpr const char* kBiasGradient = "dbias";
constexpr index_t kFewestQueries = 64;       // decoding has a shape for each step, and no time to measure
constexpr std::size_t kMostShapes = 64;      // measured; a run with more has shapes that do not come back
constexpr index_t kComparedSamples = 2;      // of a batch
constexpr double kLargestError = 0x1p-6;     // of the norm: a few roundings to bfloat16, 2^-9 each
constexpr double kLargestSumError = 0x1p-7;  // of log_sum_exp, which is float32
constexpr int kTimedRuns = 3;

std::string_view name_of(AttentionKernel kernel) {
  return kNames.at(static_cast<std::size_t>(kernel)).second;
}

// The elements of the first samples of a bfloat16 [B, tokens, heads, C], or a whole dense float32 tensor.
std::vector<float> elements_of(CudaDevice& device, const Tensor& t) {
  if (t.dtype == DType::kFloat32) {
    std::vector<float> values(static_cast<std::size_t>(t.numel()));
    device.download(t.data, values.data(), t.bytes());
    return values;
  }
  const index_t samples = std::min(t[0], kComparedSamples), row = t[2] * t[3];
  const index_t extent = (samples - 1) * t.stride[0] + (t[1] - 1) * t.stride[1] + row;
  std::vector<bfloat16> memory(static_cast<std::size_t>(extent));
  device.download(t.data, memory.data(), extent * size_of(t.dtype));
  std::vector<float> values;
  for (index_t b = 0; b < samples; ++b) {
    for (index_t i = 0; i < t[1]; ++i) {
      const bfloat16* from = memory.data() + b * t.stride[0] + i * t.stride[1];
      for (index_t c = 0; c < row; ++c) values.push_back(static_cast<float>(from[c]));
    }
  }
  return values;
}

double norm(const std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) sum += double{value} * value;
  return std::sqrt(sum);
}

// || a - b || / || b ||; of two zeros 0.
double relative_error(std::vector<float> a, const std::vector<float>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  const double difference = norm(a);
  return difference == 0 ? 0 : difference / norm(b);
}

double largest_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - b[i]);
    error = difference <= error ? error : difference;  // a NaN stays
  }
  return error;
}

}  // namespace

AttentionChoice::AttentionChoice(CudaDevice& device, AttentionChoiceOptions options)
    : device_(device), options_(std::move(options)) {}

void AttentionChoice::forward(const AttentionCall& call) {
  if (!flash_attention_supports(device_, call)) return simple_attention_forward(device_, call);
  const Work work{.call = call, .gradients = {}};
  run(kernel_for(work), work);
}

void AttentionChoice::backward(const AttentionCall& call, const AttentionGradients& gradients) {
  if (!flash_attention_supports(device_, call, gradients)) {
    return simple_attention_backward(device_, call, gradients);
  }
  const Work work{.call = call, .gradients = gradients};
  run(kernel_for(work), work);
}

AttentionShape AttentionChoice::shape_of(const Work& work) {
  return work.gradients ? regroup::shape_of(work.call, *work.gradients) : regroup::shape_of(work.call);
}

std::vector<AttentionChoice::Result> AttentionChoice::results_of(const Work& work) {
  if (!work.gradients) return {{"out", work.call.out}, {kLogSumExp, work.call.log_sum_exp}};
  const AttentionGradients& g = *work.gradients;
  std::vector<Result> results = {{"dq", g.dq}, {"dk", g.dk}, {"dv", g.dv}};
  if (g.dbias) results.push_back({kBiasGradient, g.dbias});
  return results;
}

void AttentionChoice::run(AttentionKernel kernel, const Work& work) {
  const auto& [call, gradients] = work;
  switch (kernel) {
    case AttentionKernel::kFlash:
      return gradients ? flash_attention_backward(device_, call, *gradients)
                       : flash_attention_forward(device_, call);
    case AttentionKernel::kWgmma:
      return wgmma_attention_forward(device_, call);
    case AttentionKernel::kCudnn:
      return gradients ? cudnn_->backward(call, *gradients) : cudnn_->forward(call);
  }
}

bool AttentionChoice::supports(AttentionKernel kernel, const Work& work) {
  const auto& [call, gradients] = work;
  switch (kernel) {
    case AttentionKernel::kFlash:
      return true;
    case AttentionKernel::kWgmma:
      return !gradients && wgmma_attention_supports(device_, call);
    case AttentionKernel::kCudnn:
      if (call.options.dropout_rate > 0 || (call.key_mask && !call.options.padded_at_end)) return false;
      if (cudnn() == nullptr) return false;
      return gradients ? cudnn_->supports(call, *gradients) : cudnn_->supports(call);
  }
  return false;
}

CudnnAttention* AttentionChoice::cudnn() {
  if (made_) return cudnn_.get();
  made_ = true;
  try {
    cudnn_ = options_.make_cudnn();
  } catch (const std::exception& error) {
    options_.log.warning("attention: cuDNN cannot be used ({}); our own kernels are", error.what());
  }
  return cudnn_.get();
}

AttentionKernel AttentionChoice::kernel_for(const Work& work) {
  const AttentionCall& call = work.call;
  if (options_.deterministic || call.q[1] < kFewestQueries || call.q.numel() == 0 || call.k.numel() == 0) {
    return AttentionKernel::kFlash;
  }
  const AttentionShape shape = shape_of(work);
  const auto known = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.shape == shape; });
  if (known != entries_.end()) return known->kernel;
  const auto named = named_.find(name_of(shape));
  if (named == named_.end() && entries_.size() >= kMostShapes) return AttentionKernel::kFlash;
  AttentionKernel kernel = AttentionKernel::kFlash;
  if (named == named_.end()) {
    kernel = quickest(shape, work);
  } else if (supports(named->second, work)) {
    Buffer memory;
    if (starts(named->second, shape, trial_of(work, memory))) kernel = named->second;
  }
  entries_.push_back({shape, kernel});
  return kernel;
}

AttentionKernel AttentionChoice::quickest(const AttentionShape& shape, const Work& work) {
  AttentionKernel best = AttentionKernel::kFlash;
  std::optional<float> best_time;
  Buffer sums, mask;
  for (const AttentionKernel kernel : {AttentionKernel::kWgmma, AttentionKernel::kCudnn}) {
    if (!supports(kernel, work)) continue;
    const Work trial = trial_of(work, sums);
    if (!agrees(kernel, shape, trial)) continue;
    if (work.call.key_mask && !agrees(kernel, shape, with_few_keys(trial, mask))) continue;
    const auto time = [&](AttentionKernel timed) { return options_.time([&] { run(timed, trial); }); };
    if (!best_time) best_time = time(best);
    const float own_time = time(kernel);
    if (own_time >= *best_time) continue;
    best = kernel;
    best_time = own_time;
  }
  return best;
}

AttentionChoice::Work AttentionChoice::trial_of(const Work& work, Buffer& memory) {
  Work trial = work;
  if (work.gradients && work.gradients->dbias) {
    const Tensor& dbias = work.gradients->dbias;
    if (memory.bytes() == 0) memory = device_.allocate(dbias.bytes());
    trial.gradients->dbias = memory.tensor(dbias.dtype, {dbias[0], dbias[1]});
  }
  return trial;
}

AttentionChoice::Work AttentionChoice::with_few_keys(Work work, Buffer& memory) {
  Tensor& mask = work.call.key_mask;
  const index_t samples = mask[0], keys = mask[1];
  std::vector<std::int32_t> seen(static_cast<std::size_t>(samples * keys));
  for (index_t b = 0; b < samples; ++b) {
    const index_t count = std::max<index_t>(1, (b + 1) * keys / (samples + 1));
    std::fill_n(seen.begin() + b * keys, count, 1);
  }
  if (memory.bytes() == 0) memory = device_.allocate(mask.bytes());
  mask = memory.tensor(mask.dtype, {samples, keys});
  device_.upload(seen.data(), mask.data, mask.bytes());
  return work;
}

bool AttentionChoice::agrees(AttentionKernel kernel, const AttentionShape& shape, const Work& trial) {
  std::vector<std::vector<float>> theirs;
  fill_results_with_nan(trial);
  if (!starts(kernel, shape, trial)) return false;
  for (const Result& result : results_of(trial)) theirs.push_back(elements_of(device_, result.tensor));
  fill_results_with_nan(trial);
  run(AttentionKernel::kFlash, trial);
  auto own = theirs.cbegin();
  for (const Result& result : results_of(trial)) {
    const std::vector<float> expected = elements_of(device_, result.tensor);
    const bool is_sum = result.name == kLogSumExp;
    const double error = is_sum ? largest_error(*own, expected) : relative_error(*own, expected);
    ++own;
    if (error <= (is_sum ? kLargestSumError : kLargestError)) continue;
    options_.log.warning("attention, {}: {} of {} is off by {:.2g}; the kernel is not used", name_of(shape),
                         result.name, name_of(kernel), error);
    return false;
  }
  return true;
}

// Only what is thrown as the work is issued: what is thrown while the host waits, as by a failed sum of
// NCCL's, is not the kernel's.
bool AttentionChoice::starts(AttentionKernel kernel, const AttentionShape& shape, const Work& trial) {
  try {
    run(kernel, trial);
    return true;
  } catch (const std::exception& error) {
    options_.log.warning("attention, {}: {} fails ({}); the kernel is not used", name_of(shape),
                         name_of(kernel), error.what());
    return false;
  }
}

void AttentionChoice::fill_results_with_nan(const Work& trial) {
  for (const Result& result : results_of(trial)) {
    const Tensor& t = result.tensor;
    if (result.name == kBiasGradient) {
      check_cuda(cudaMemsetAsync(t.data, 0, static_cast<std::size_t>(t.bytes()), device_.stream()),
                 "cudaMemsetAsync");
    } else if (t.is_contiguous()) {
      check_cuda(cudaMemsetAsync(t.data, 0xFF, static_cast<std::size_t>(t.bytes()), device_.stream()),
                 "cudaMemsetAsync");
    } else {
      const index_t element = size_of(t.dtype);
      for (index_t b = 0; b < t[0]; ++b) {
        check_cuda(cudaMemset2DAsync(static_cast<std::byte*>(t.data) + b * t.stride[0] * element,
                                     static_cast<std::size_t>(t.stride[1] * element), 0xFF,
                                     static_cast<std::size_t>(t[2] * t[3] * element),
                                     static_cast<std::size_t>(t[1]), device_.stream()),
                   "cudaMemset2DAsync");
      }
    }
  }
}

std::string AttentionChoice::chosen() const {
  nlohmann::json table = nlohmann::json::object();
  for (const auto& [name, kernel] : named_) table[name] = name_of(kernel);
  for (const Entry& entry : entries_) table[name_of(entry.shape)] = name_of(entry.kernel);
  return json_text(table, 2) + "\n";
}

void AttentionChoice::choose(const std::string& table) {
  std::map<std::string, AttentionKernel> named;
  try {
    for (const auto& [name, choice] : parse_json(table).get<std::map<std::string, std::string>>()) {
      const auto known = std::find_if(kNames.begin(), kNames.end(),
                                      [&choice = choice](const auto& pair) { return pair.second == choice; });
      if (known == kNames.end()) {
        throw UserError(
            "the table of attention kernels has '{}' for the {}, where 'flash', 'wgmma' or 'cuDNN' belongs",
            choice, name);
      }
      named[name] = known->first;
    }
  } catch (const nlohmann::json::exception& error) {
    throw UserError("the table of attention kernels cannot be read: {}", error.what());
  }
  named_ = std::move(named);
}

AttentionChoiceOptions attention_choice_options(CudaDevice& device, bool deterministic) {
  return {.deterministic = deterministic,
          .log = Log(),
          .make_cudnn = [&device] { return make_cudnn_attention(device, Log()); },
          .time =
              [&device](const std::function<void()>& work) {
                return CudaStopwatch(device).quickest(kTimedRuns, work);
              }};
}

}  // namespace regroup
