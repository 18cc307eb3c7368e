// What calibration knows of the inputs of one attention.
#pragma once

#include <vector>

#include "kernels/dtype.h"

namespace regroup {

// Second moments over calibration tokens, float64 [width, width], row-major, symmetric. x_i is the input of
// query i, y_j that of key and value j (both normalised where the attention normalises), padding left out;
// p_ij are the attention's probabilities, for every query head of the model. Means over what is said:
struct SecondMoments {
  index_t width = 0;              // d_model
  std::vector<double> query;      // E_i[x_i x_i^T], over real queries
  std::vector<double> key;        // E_j[y_j y_j^T], over real keys
  std::vector<double> attending;  // E_ih[sum_j p_ij y_j y_j^T]: keys as often as they are looked at
  std::vector<double> attended;   // E_ih[z_ih z_ih^T], z_ih = sum_j p_ij y_j: what is passed on
};

}  // namespace regroup
