// Which kernels do an attention: flash kernels, Hopper's or cuDNN's, by what they measure.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/log.h"
#include "kernels/cuda/attention_shape.h"
#include "kernels/cuda/cudnn_attention.h"

namespace regroup {

struct AttentionChoiceOptions {
  // The flash kernels always: what they compute depends on shapes alone.
  bool deterministic = false;
  Log log;  // of kernels that fail or disagree
  // cuDNN, made at the first call that it may do; nullptr where this build is without.
  std::function<std::unique_ptr<CudnnAttention>()> make_cudnn;
  // How long a piece of work takes on the device; the quickest of a few runs.
  std::function<float(const std::function<void()>& work)> time;
};

enum class AttentionKernel : std::uint8_t {
  kFlash,  // of every GPU, forward and backward: what the others are held to
  kWgmma,  // forward
  kCudnn,
};

// Attention on one device's stream, checked by Backend. bfloat16, 64 queries or more: the first call of a
// shape runs all kernels that can do it on the operands themselves, forward and backward apart. The fastest
// is chosen of those whose results are the flash kernels' to within the error of bfloat16, where keys are
// masked also with fewer keys than the call shows. A kernel that disagrees or fails is told in a warning and
// not used for the shape. Later calls of the shape wait for nothing and allocate nothing. Fewer queries: the
// flash kernels. What those cannot do: plain loops.
class AttentionChoice {
 public:
  AttentionChoice(CudaDevice& device, AttentionChoiceOptions options);

  void forward(const AttentionCall& call);
  void backward(const AttentionCall& call, const AttentionGradients& gradients);

  // The choices so far, as text: {name_of(shape): "flash", "wgmma" or "cuDNN", ...}.
  std::string chosen() const;
  // Shapes that have had no call yet are done as `table`, an earlier chosen(), says, where that kernel runs.
  // UserError where it is no such table.
  void choose(const std::string& table);

 private:
  struct Entry {
    AttentionShape shape;
    AttentionKernel kernel = AttentionKernel::kFlash;
  };
  // One attention; a backward where it has gradients.
  struct Work {
    AttentionCall call;
    std::optional<AttentionGradients> gradients;
  };
  struct Result {
    const char* name;
    Tensor tensor;
  };

  static AttentionShape shape_of(const Work& work);
  static std::vector<Result> results_of(const Work& work);

  void run(AttentionKernel kernel, const Work& work);
  bool supports(AttentionKernel kernel, const Work& work);
  CudnnAttention* cudnn();
  AttentionKernel kernel_for(const Work& work);
  AttentionKernel quickest(const AttentionShape& shape, const Work& work);
  // Its bias gradient is memory of the trial's own: the caller's is added to.
  Work trial_of(const Work& work, Buffer& memory);
  // The work with fewer keys, in a mask of its own.
  Work with_few_keys(Work work, Buffer& memory);
  bool agrees(AttentionKernel kernel, const AttentionShape& shape, const Work& trial);
  // Whether the kernel takes the work. What it throws is a warning.
  bool starts(AttentionKernel kernel, const AttentionShape& shape, const Work& trial);
  void fill_results_with_nan(const Work& trial);

  CudaDevice& device_;
  AttentionChoiceOptions options_;
  bool made_ = false;  // cudnn_, or the knowledge that there is none
  std::unique_ptr<CudnnAttention> cudnn_;
  std::vector<Entry> entries_;
  std::map<std::string, AttentionKernel> named_;  // by choose(): of the shape of this name
};

// The options of a training run: make_cudnn_attention(), events on the device's stream.
AttentionChoiceOptions attention_choice_options(CudaDevice& device, bool deterministic);

}  // namespace regroup
