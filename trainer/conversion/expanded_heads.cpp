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

void ExpandedReader::read(const std::string& name, int dim, index_t begin, index_t end,
                          const Tensor& out) const {
  const auto repeated = repeats_.find(name);
  if (repeated == repeats_.end()) {
    reader_.read(name, dim, begin, end, out);
  } else if (dim == 0) {
    read_rows(name, repeated->second, begin, end, out);
  } else {
    read_columns(name, repeated->second, begin, end, out);
  }
}

void ExpandedReader::read_rows(const std::string& name, index_t repeats, index_t begin, index_t end,
                               const Tensor& out) const {
  for (index_t row = begin; row < end;) {
    const index_t head = row / d_kv_;
    const index_t next = std::min(end, (head + 1) * d_kv_);
    const index_t from = head / repeats * d_kv_ + row % d_kv_;
    reader_.read(name, 0, from, from + next - row, out.slice(0, row - begin, next - begin));
    row = next;
  }
}

// The columns of all groups, then each to the places of its heads, the last ones first: none is overwritten
// before it has been copied.
void ExpandedReader::read_columns(const std::string& name, index_t repeats, index_t begin, index_t end,
                                  const Tensor& out) const {
  const index_t heads = out.shape[0] / d_kv_, head_elements = d_kv_ * (end - begin);
  reader_.read(name, 1, begin, end, out.slice(0, 0, out.shape[0] / repeats));
  for (index_t head = heads - 1; head > 0; --head) {
    std::copy_n(out.as<float>() + head / repeats * head_elements, head_elements,
                out.as<float>() + head * head_elements);
  }
}

}  // namespace regroup
