// Backward ops against central differences of forward ops, in float64.
#pragma once

#include "tests/support/op_case.h"

namespace regroup::test {

// With random projections P of the forward's outputs (argument "dy" of `backward` for each output "y"; an
// output without one has no part in it), every output "dx" of `backward` must be
//   d/dx sum_y <P_y, y(x)>   (added to what was there, where its role is kAccumulated)
// for the forward's input "x". Relative to the largest element of the gradient, to kGradientTolerance.
void expect_gradients(Backend& backend, const OpCase& forward, const OpCase& backward);

}  // namespace regroup::test
