// Multi-head to grouped-query conversion while loading (Ainslie et al. 2023, section 2.1): the key and value
// heads of a group become one head, by mean, by taking the first, or by drawing a fresh one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "parallel/partition.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/model/config.h"

namespace regroup {

enum class Pooling { kMean, kFirst, kRandom };
Pooling pooling_from_string(const std::string& name);  // "mean" ...; UserError naming the nearest
std::string to_string(Pooling pooling);
std::vector<std::string> pooling_names();

struct ConversionOptions {
  Pooling pooling = Pooling::kMean;
  std::uint64_t seed = 0;  // of kRandom
};

// source [groups * heads_per_group * d_kv, d_model] -> out [groups * d_kv, d_model], both dense float32.
// kMean: out[g, i, :] = 1/K sum_k source[g K + k, i, :], summed in float64; kFirst: source[g K, i, :].
// InternalError for kRandom (draw_heads()) and for shapes that do not fit.
void pool_heads(const Tensor& source, const Tensor& out, index_t heads_per_group, index_t d_kv,
                Pooling pooling);

// out = the rows [row_begin, ...) of a fresh parameter `name`: normal with standard deviation `scale`,
// element e of the global tensor being a function of (seed, name, e) only. Independent of the draws that
// initialise a model of the same seed.
void draw_heads(const Tensor& out, const std::string& name, index_t row_begin, double scale,
                std::uint64_t seed);

// UserError naming the field and both values unless a `parent` can become a `target`: equal but for
// kv_groups and encoder_kv_groups, which must divide the parent's (the message lists the legal values), and
// dropout_rate.
void validate_conversion(const ModelConfig& parent, const ModelConfig& target);

// A key or value projection with fewer groups in the target than in the parent.
struct Regrouping {
  index_t source_rows = 0;
  index_t heads_per_group = 0;
  double scale = 0;  // standard deviation of fresh heads
};

// Reads a checkpoint of a `parent` as one of a `target`, tensor by tensor. Where a key or value projection
// has fewer groups in the target, its heads are pooled; everything else is read as it is, so with equal
// numbers of groups this is plain reading whatever the options. Not collective.
class ConvertingReader {
 public:
  // UserError as validate_conversion() and CheckpointReader::require(). `reader` outlives it.
  ConvertingReader(const CheckpointReader& reader, const ModelConfig& parent, const ModelConfig& target,
                   const ConversionOptions& options = {});

  // Fills `to`, a dense float32 host slice of a parameter of the target, by any partition of whole groups; of
  // the parent's heads it reads those of the slice's groups and no others.
  void read(const ShardedTensor& to) const;

 private:
  const CheckpointReader& reader_;
  index_t d_kv_, d_model_;
  ConversionOptions options_;
  std::map<std::string, Regrouping> regroupings_;  // by parameter
};

}  // namespace regroup
