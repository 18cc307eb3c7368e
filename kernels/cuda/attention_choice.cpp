#include "kernels/cuda/attention_choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/json.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/simple_attention.h"
#include "kernels/cuda/stopwatch.h"

namespace regroup {
namespace {

constexpr const char* kCudnn = "cuDNN";
constexpr const char* kFlash = "flash";
constexpr const char* kLogSumExp = "log_sum_exp";
constexpr index_t kFewestQueries = 64;       // decoding has a shape for each step, and no time to measure
constexpr std::size_t kMostShapes = 64;      // measured; a run with more has shapes that do not come back
constexpr index_t kComparedSamples = 2;      // of a batch
constexpr double kLargestError = 0x1p-6;     // of the norm: a few roundings to bfloat16, 2^-9 each
constexpr double kLargestSumError = 0x1p-7;  // of log_sum_exp, which is float32
constexpr int kTimedRuns = 3;

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
  if (!flash_attention_supports(call)) return simple_attention_forward(device_, call);
  if (may_choose(call) && measure(call)) return cudnn_->forward(call);
  flash_attention_forward(device_, call);
}

void AttentionChoice::backward(const AttentionCall& call, const AttentionGradients& gradients) {
  if (!flash_attention_supports(call, gradients)) return simple_attention_backward(device_, call, gradients);
  if (may_choose(call) && measure(call, gradients)) return cudnn_->backward(call, gradients);
  flash_attention_backward(device_, call, gradients);
}

bool AttentionChoice::may_choose(const AttentionCall& call) {
  if (options_.deterministic || call.options.dropout_rate > 0 || call.q[1] < kFewestQueries ||
      call.q.numel() == 0 || call.k.numel() == 0 || (call.key_mask && !call.options.padded_at_end)) {
    return false;
  }
  if (!made_) {
    made_ = true;
    cudnn_ = options_.make_cudnn();
  }
  return cudnn_ != nullptr;
}

const AttentionChoice::Entry* AttentionChoice::find(const AttentionShape& shape) const {
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.shape == shape; });
  return found == entries_.end() ? nullptr : &*found;
}

bool AttentionChoice::measure(const AttentionCall& call) {
  const AttentionShape shape = shape_of(call);
  if (const Entry* known = find(shape)) return known->by_cudnn;
  return decide(
      shape, [&] { return cudnn_->supports(call); },
      [&] {
        const std::vector<Result> results = {{"out", call.out}, {kLogSumExp, call.log_sum_exp}};
        return is_faster(shape, {[&] { cudnn_->forward(call); }, results},
                         {[&] { flash_attention_forward(device_, call); }, results});
      });
}

bool AttentionChoice::measure(const AttentionCall& call, const AttentionGradients& gradients) {
  const AttentionShape shape = shape_of(call, gradients);
  if (const Entry* known = find(shape)) return known->by_cudnn;
  return decide(
      shape, [&] { return cudnn_->supports(call, gradients); },
      [&] {
        // dbias is added to: the trials add to zeros of their own.
        AttentionGradients by_cudnn = gradients, by_flash = gradients;
        Buffer sums;
        if (gradients.dbias) {
          const Tensor& dbias = gradients.dbias;
          sums = device_.allocate(2 * dbias.bytes());
          by_cudnn.dbias = sums.tensor(dbias.dtype, {dbias[0], dbias[1]});
          by_flash.dbias = sums.tensor(dbias.dtype, {dbias[0], dbias[1]}, dbias.bytes());
        }
        const auto results = [](const AttentionGradients& g) {
          std::vector<Result> all = {{"dq", g.dq}, {"dk", g.dk}, {"dv", g.dv}};
          if (g.dbias) all.push_back({"dbias", g.dbias});
          return all;
        };
        return is_faster(shape, {[&] { cudnn_->backward(call, by_cudnn); }, results(by_cudnn)},
                         {[&] { flash_attention_backward(device_, call, by_flash); }, results(by_flash)});
      });
}

bool AttentionChoice::decide(const AttentionShape& shape, const std::function<bool()>& supported,
                             const std::function<bool()>& measured) {
  const auto named = named_.find(name_of(shape));
  if (named == named_.end() && entries_.size() >= kMostShapes) return false;
  const bool by_cudnn = named == named_.end() ? supported() && measured() : named->second && supported();
  entries_.push_back({shape, by_cudnn});
  return by_cudnn;
}

bool AttentionChoice::is_faster(const AttentionShape& shape, const Trial& cudnn, const Trial& flash) {
  return agree(shape, cudnn, flash) && options_.time(cudnn.run) < options_.time(flash.run);
}

// cuDNN goes first: what it should write and does not is then not there from the other.
bool AttentionChoice::agree(const AttentionShape& shape, const Trial& cudnn, const Trial& flash) {
  cudnn.run();
  std::vector<std::vector<float>> theirs;
  for (const Result& result : cudnn.results) theirs.push_back(elements_of(device_, result.tensor));
  flash.run();
  for (std::size_t i = 0; i < theirs.size(); ++i) {
    const Result& result = flash.results[i];
    const std::vector<float> ours = elements_of(device_, result.tensor);
    const bool is_sum = result.name == kLogSumExp;
    const double error = is_sum ? largest_error(theirs[i], ours) : relative_error(theirs[i], ours);
    if (error <= (is_sum ? kLargestSumError : kLargestError)) continue;
    options_.log.warning("attention, {}: cuDNN's {} is off by {:.2g}; our own kernels are used",
                         name_of(shape), result.name, error);
    return false;
  }
  return true;
}

std::string AttentionChoice::chosen() const {
  nlohmann::json table = nlohmann::json::object();
  for (const auto& [name, by_cudnn] : named_) table[name] = by_cudnn ? kCudnn : kFlash;
  for (const Entry& entry : entries_) table[name_of(entry.shape)] = entry.by_cudnn ? kCudnn : kFlash;
  return json_text(table, 2) + "\n";
}

void AttentionChoice::choose(const std::string& table) {
  std::map<std::string, bool> named;
  try {
    for (const auto& [name, choice] : parse_json(table).get<std::map<std::string, std::string>>()) {
      if (choice != kCudnn && choice != kFlash) {
        throw UserError("the table of attention kernels has '{}' for the {}, where '{}' or '{}' belongs",
                        choice, name, kFlash, kCudnn);
      }
      named[name] = choice == kCudnn;
    }
  } catch (const nlohmann::json::exception& error) {
    throw UserError("the table of attention kernels cannot be read: {}", error.what());
  }
  named_ = std::move(named);
}

AttentionChoiceOptions attention_choice_options(CudaDevice& device, bool deterministic) {
  return {.deterministic = deterministic,
          .log = Log(),
          .make_cudnn = [&device] { return make_cudnn_attention(device); },
          .time =
              [&device](const std::function<void()>& work) {
                return CudaStopwatch(device).quickest(kTimedRuns, work);
              }};
}

}  // namespace regroup
