// Which kernels do an attention: our own, or cuDNN's where they measure faster.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/log.h"
#include "kernels/cuda/attention_shape.h"
#include "kernels/cuda/cudnn_attention.h"

namespace regroup {

struct AttentionChoiceOptions {
  // Our own kernels always: what they compute depends on shapes alone.
  bool deterministic = false;
  Log log;  // of results that disagree
  // cuDNN, made at the first call that it may do; nullptr where this build is without.
  std::function<std::unique_ptr<CudnnAttention>()> make_cudnn;
  // How long a piece of work takes on the device; the quickest of a few runs.
  std::function<float(const std::function<void()>& work)> time;
};

// Attention on one device's stream, checked by Backend. bfloat16 without dropout, 64 queries or more: the
// first call of a shape runs the flash kernels and cuDNN's on the operands themselves, forward and backward
// apart. cuDNN is chosen where it is faster and its results are the flash kernels' to within the error of
// bfloat16; where they are not, a warning says so. Later calls of the shape wait for nothing and allocate
// nothing. Else: the flash kernels, or where they cannot do a call, plain loops.
class AttentionChoice {
 public:
  AttentionChoice(CudaDevice& device, AttentionChoiceOptions options);

  void forward(const AttentionCall& call);
  void backward(const AttentionCall& call, const AttentionGradients& gradients);

  // The choices so far, as text: {name_of(shape): "flash" or "cuDNN", ...}.
  std::string chosen() const;
  // Shapes that have had no call yet are done as `table`, an earlier chosen(), says. UserError where it is no
  // such table.
  void choose(const std::string& table);

 private:
  struct Entry {
    AttentionShape shape;
    bool by_cudnn = false;
  };
  struct Result {
    const char* name;
    Tensor tensor;
  };
  // One way to do a call, and where it writes.
  struct Trial {
    std::function<void()> run;
    std::vector<Result> results;
  };

  // Whether cuDNN may do calls like this at all.
  bool may_choose(const AttentionCall& call);
  const Entry* find(const AttentionShape& shape) const;
  bool measure(const AttentionCall& call);
  bool measure(const AttentionCall& call, const AttentionGradients& gradients);
  // A shape's first call; `measured`: whether cuDNN agrees and measures faster.
  bool decide(const AttentionShape& shape, const std::function<bool()>& supported,
              const std::function<bool()>& measured);
  bool is_faster(const AttentionShape& shape, const Trial& cudnn, const Trial& flash);
  bool agree(const AttentionShape& shape, const Trial& cudnn, const Trial& flash);

  CudaDevice& device_;
  AttentionChoiceOptions options_;
  bool made_ = false;  // cudnn_, or the knowledge that there is none
  std::unique_ptr<CudnnAttention> cudnn_;
  std::vector<Entry> entries_;
  std::map<std::string, bool> named_;  // by choose(): whether cuDNN does the shape of this name
};

// The options of a training run: make_cudnn_attention(), events on the device's stream.
AttentionChoiceOptions attention_choice_options(CudaDevice& device, bool deterministic);

}  // namespace regroup
