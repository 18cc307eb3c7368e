// A grouped-query checkpoint read as the multi-head model that computes the same: every query head with a key
// and a value head of its own, which are those of its group repeated.
#pragma once

#include <map>
#include <string>

#include "trainer/formats/checkpoint_reader.h"
#include "trainer/model/config.h"

namespace regroup {

// The same model with as many key/value groups as heads, in every attention.
ModelConfig expanded(const ModelConfig& config);

// Reads slices of the expanded model's tensors, a group's rows as often as they are asked for. `reader`
// outlives it. Not collective; UserErrors as CheckpointReader.
class ExpandedReader {
 public:
  // `config`: of the checkpoint.
  ExpandedReader(const CheckpointReader& reader, const ModelConfig& config);

  // [begin, end) of dimension `dim` of the expanded tensor into `out`, dense float32: row h d_kv + i of a key
  // or value weight is row (h G / H) d_kv + i of the checkpoint's; every other tensor is as it is.
  void read(const std::string& name, int dim, index_t begin, index_t end, const Tensor& out) const;

 private:
  void read_rows(const std::string& name, index_t repeats, index_t begin, index_t end,
                 const Tensor& out) const;
  void read_columns(const std::string& name, index_t repeats, index_t begin, index_t end,
                    const Tensor& out) const;

  const CheckpointReader& reader_;
  index_t d_kv_;
  std::map<std::string, index_t> repeats_;  // by key or value weight: H / G, where that is not 1
};

}  // namespace regroup
