// The token embedding that encoder and decoder share, split over the vocabulary.
#pragma once

#include "trainer/model/parameter_store.h"
#include "trainer/model/step.h"

namespace regroup {

class TokenEmbedding {
 public:
  TokenEmbedding(const ParameterStore& store, int tp_rank)
      : table_(store.parameter("shared.weight")), first_id_(tp_rank * table_.weight[0]) {}

  // y = dropout(table[ids]); ids int32 [N], y T [N, D], `length` rows a sample.
  void forward(Step& step, Tensor ids, Tensor y, index_t length, index_t site) const {
    step.backend.embedding(ids, table_.weight, first_id_, y);
    step.mesh.tp().all_reduce(y);  // one rank has the row, the others zeros: exact
    if (step.dropout_rate > 0) step.backend.dropout_add({}, y, y, step.dropout(site, length, y[1]));
  }
  // gradient T [N, D], of y; overwritten.
  void backward(Step& step, Tensor ids, Tensor gradient, index_t length, index_t site) const {
    if (step.dropout_rate > 0) {
      step.backend.dropout_backward(gradient, gradient, step.dropout(site, length, gradient[1]));
    }
    step.backend.embedding_backward(ids, gradient, first_id_, table_.gradient);
  }

  DType dtype() const { return table_.weight.dtype; }
  index_t width() const { return table_.weight[1]; }  // D

 private:
  Parameter table_;
  index_t first_id_;
};

}  // namespace regroup
