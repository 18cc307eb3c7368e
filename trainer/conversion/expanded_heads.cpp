#include "trainer/conversion/expanded_heads.h"

#include <algorithm>

#include "trainer/model/parameters.h"

namespace regroup {

ModelConfig expanded(const ModelConfig& config) {
  ModelConfig result = config;
  result.kv_groups = result.encoder_kv_groups = config.num_heads;
  result.site_kv_groups.clear();
  return result;
}

ExpandedReader::ExpandedReader(const CheckpointReader& reader, const ModelConfig& config)
    : reader_(reader), d_kv_(config.d_kv) {
  for (const AttentionSite& site : attention_sites(config)) {
    if (site.kv_groups == config.num_heads) continue;
    repeats_[site.prefix + "k.weight"] = config.num_heads / site.kv_groups;
    repeats_[site.prefix + "v.weight"] = config.num_heads / site.kv_groups;
  }
}

void ExpandedReader::read_rows(const std::string& name, index_t begin, index_t end, const Tensor& out) const {
  const auto repeated = repeats_.find(name);
  if (repeated == repeats_.end()) {
    reader_.read(name, 0, begin, end, out);
    return;
  }
  for (index_t row = begin; row < end;) {
    const index_t head = row / d_kv_;
    const index_t next = std::min(end, (head + 1) * d_kv_);
    const index_t from = head / repeated->second * d_kv_ + row % d_kv_;
    reader_.read(name, 0, from, from + next - row, out.slice(0, row - begin, next - begin));
    row = next;
  }
}

}  // namespace regroup
