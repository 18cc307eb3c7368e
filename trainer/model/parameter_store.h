// The memory of all parameters of one rank.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "trainer/model/parameters.h"

namespace regroup {

// One parameter, or several that lie one behind the other, as a module uses it: this rank's slice.
struct Parameter {
  Tensor weight;    // compute type T
  Tensor gradient;  // stat_dtype(T); empty in a store without gradients
};

// Three flat buffers in the order of the table: masters (S), weights (T; the masters themselves where T = S)
// and gradients (S). Packs (see ParameterSpec::begins_pack) are dense, so that q|k|v is one matrix.
class ParameterStore {
 public:
  struct Options {
    DType compute = DType::kFloat32;
    int tp_rank = 0;
    int tp_size = 1;
    bool gradients = true;
  };
  ParameterStore(Backend& backend, const ModelConfig& config, const Options& options);

  const ModelConfig& config() const { return config_; }
  DType compute_dtype() const { return compute_; }
  const std::vector<ParameterSpec>& table() const { return table_; }
  std::size_t size() const { return table_.size(); }
  const Slice& slice(std::size_t index) const { return slices_[index]; }

  Tensor master(std::size_t index) const { return view(masters_, stat_dtype(compute_), index); }
  Tensor gradient(std::size_t index) const { return view(gradients_, stat_dtype(compute_), index); }
  // By name; InternalError for a name that is not in the table.
  Parameter parameter(const std::string& name) const;
  // The rows of `count` matrices of one pack, one below the other.
  Parameter pack(const std::string& first, std::size_t count) const;

  // Flat views of everything, padding included (its elements are 0).
  Tensor all_masters() const { return flat(masters_, stat_dtype(compute_)); }
  Tensor all_weights() const { return compute_is_master() ? all_masters() : flat(weights_, compute_); }
  Tensor all_gradients() const { return flat(gradients_, stat_dtype(compute_)); }
  // Where the decoder's parameters, and lm_head's behind them, begin in the flat views: an element number. A
  // tied head's matrix is the embedding, before it.
  index_t decoder_begin() const { return offsets_[find("decoder.block.0.layer.0.SelfAttention.q.weight")]; }

  // weights = cast(masters). Call after masters change.
  void refresh_weights();
  // Draws every master from (seed, name, global element): the same numbers in any layout.
  void initialise(std::uint64_t seed);

 private:
  bool compute_is_master() const { return compute_ == stat_dtype(compute_); }
  Tensor view(const Buffer& buffer, DType dtype, std::size_t index) const;
  Tensor flat(const Buffer& buffer, DType dtype) const;
  std::size_t find(const std::string& name) const;

  Backend& backend_;
  ModelConfig config_;
  DType compute_;
  std::vector<ParameterSpec> table_;
  std::map<std::string, std::size_t> index_;
  std::vector<Slice> slices_;
  std::vector<std::vector<index_t>> shapes_;  // local
  std::vector<index_t> offsets_;              // in elements
  index_t total_ = 0;
  Buffer masters_, weights_, gradients_;
};

// The initial values of the elements [begin, end) of `spec`'s dimension slice.dim, in the order of the local
// tensor.
std::vector<float> initial_values(const ParameterSpec& spec, const Slice& slice, std::uint64_t seed);

}  // namespace regroup
