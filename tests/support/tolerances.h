// How far a result may be from the exact one. One rule for every op; nothing is tuned by hand.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/dtype.h"

namespace regroup::test {

// Unit roundoff: half the distance from 1 to the next number.
inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kInt32:
      break;
  }
  return 0;
}

// Rounding operations of an elementwise formula; the library's exp and the polynomial in its place included.
constexpr double kElementwiseOperations = 16;

// An output of type `stored`, computed in `statistic` (stat_dtype of the compute type) with sums of `length`
// terms, may differ from the exact value y by
//   u(stored) |y|                                one rounding on the way to memory, and
//   (16 + length) u(statistic) magnitude         the classical bound of a sum of `length` terms (Higham,
//   2002,
//                                                section 4.2) behind an elementwise formula,
// where magnitude is the largest |y| of the output, or what the case says the summed terms reach. Inputs are
// exactly representable, so they bring no error.
inline double tolerance(DType stored, DType statistic, double length, double exact, double magnitude) {
  return unit_roundoff(stored) * std::abs(exact) +
         (kElementwiseOperations + length) * unit_roundoff(statistic) * magnitude;
}

inline double largest(const std::vector<double>& values) {
  double result = 0;
  for (const double v : values) result = std::max(result, std::abs(v));
  return result;
}

// Central differences of f with |f'''| ~ |f|: truncation h^2 and rounding u/h balance at h = u^(1/3), leaving
// u^(2/3); three decimal digits are kept in hand for the curvature of the op.
constexpr double kDifferenceStep = 6e-6;
constexpr double kGradientTolerance = 1e-7;

}  // namespace regroup::test
