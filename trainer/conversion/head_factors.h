// The factors of one attention's heads, from a checkpoint and the moments of its inputs.
#pragma once

#include <span>

#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/conversion/head_merging.h"
#include "trainer/conversion/second_moments.h"
#include "trainer/model/parameters.h"

namespace regroup {

// Rows of a weight that hold head `head`: [d_kv, columns], in float64.
Matrix read_head(const CheckpointReader& reader, const std::string& name, index_t head, index_t d_kv,
                 index_t d_model);
// Columns: [d_model, d_kv].
Matrix read_output_head(const CheckpointReader& reader, const std::string& name, index_t head, index_t d_kv,
                        index_t d_model);

// Reads heads as they are asked for; holds two factors of [d_model, d_model] beside them.
class SiteFactors {
 public:
  // `site`: of the parent. `moments`: of the site, or null: every input is as likely as any other.
  SiteFactors(const CheckpointReader& reader, const ModelConfig& parent, const AttentionSite& site,
              const SecondMoments* moments);

  // Of these key/value heads of the parent.
  HeadProducts scores(std::span<const index_t> heads) const;   // W_q,h^T W_k,h
  HeadProducts outputs(std::span<const index_t> heads) const;  // W_o,h W_v,h

 private:
  const CheckpointReader& reader_;
  ModelConfig parent_;
  AttentionSite site_;
  Matrix queries_, keys_, values_;  // L of each; empty: the identity
};

// Multiplies shared and mixes by an invertible matrix and its inverse, so that optimizers see ordinary
// parameters; the products stay.
void balance(const HeadProducts& heads, SharedHead& merged);

}  // namespace regroup
