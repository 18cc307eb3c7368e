// Activation recompute: a layer that keeps its input only.
#pragma once

#include "trainer/model/step.h"

namespace regroup {

// layer.forward(step, x, y, saved, args...), where under step.recompute nothing but x and y outlives the
// call.
template <class Layer, class... Args>
void forward_layer(Step& step, const Layer& layer, Tensor x, Tensor y, typename Layer::Saved& saved,
                   const Args&... args) {
  if (!step.recompute) return layer.forward(step, x, y, saved, args...);
  const Arena::Frame frame(step.saved);
  typename Layer::Saved forgotten;
  layer.forward(step, x, y, forgotten, args...);
}

// layer.backward(step, gradient, saved, args...), preceded under step.recompute by as much of the forward as
// it needs: all but the layer's output.
template <class Layer, class... Args>
void backward_layer(Step& step, const Layer& layer, Tensor x, Tensor gradient,
                    const typename Layer::Saved& saved, const Args&... args) {
  if (!step.recompute) return layer.backward(step, gradient, saved, args...);
  const Arena::Frame frame(step.saved);
  typename Layer::Saved again;
  layer.forward(step, x, /*y=*/Tensor(), again, args...);
  layer.backward(step, gradient, again, args...);
}

}  // namespace regroup
