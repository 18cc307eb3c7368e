// What a plan counts is what a run does.
#include "kernels/plan_backend.h"

#include <gtest/gtest.h>

#include "kernels/arena.h"
#include "kernels/make_backend.h"

namespace regroup {
namespace {

// A feed-forward block's forward and backward, as a model would write it.
index_t feed_forward(Backend& backend, index_t tokens, index_t model, index_t inner) {
  Arena arena(backend.allocate(1 << 20));
  const DType f = DType::kFloat32;
  const Tensor x = arena.allocate(f, {tokens, model}), w = arena.allocate(f, {model});
  const Tensor wi = arena.allocate(f, {2 * inner, model}), wo = arena.allocate(f, {model, inner});
  const Tensor r = arena.allocate(f, {tokens}), y = arena.allocate(f, {tokens, model});
  backend.rms_norm(x, w, y, r, 1e-6);
  {
    const Arena::Frame frame(arena);
    const Tensor gate = arena.allocate(f, {tokens, 2 * inner}), hidden = arena.allocate(f, {tokens, inner});
    backend.matmul(y, wi, gate, {.transpose_b = true});
    backend.gated_gelu(gate, hidden, {});
    backend.matmul(hidden, wo, y, {.transpose_b = true});
  }
  backend.dropout_add(x, y, y, {});
  return arena.high_water();
}

TEST(PlanBackend, SameBytesAndOperationsAsTheCpu) {
  PlanBackend plan;
  const auto owned = make_backend({.threads = 1});
  Backend& cpu = *owned;
  EXPECT_EQ(feed_forward(plan, 9, 20, 40), feed_forward(cpu, 9, 20, 40));
  EXPECT_EQ(plan.flops(), cpu.flops());
  EXPECT_EQ(plan.flops(), 2.0 * 9 * 20 * 80 + 2.0 * 9 * 40 * 20);
  EXPECT_EQ(plan.allocated(), 1 << 20);
}

TEST(PlanBackend, PlansMoreThanAnyMachineHas) {
  PlanBackend plan;
  const Buffer a = plan.allocate(index_t{1} << 45), b = plan.allocate(index_t{1} << 45);
  EXPECT_FALSE(overlaps(a.tensor(DType::kFloat32, {index_t{1} << 43}), b.tensor(DType::kFloat32, {1})));
  EXPECT_EQ(plan.allocated(), index_t{1} << 46);
}

}  // namespace
}  // namespace regroup
