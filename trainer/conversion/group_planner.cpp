#include "trainer/conversion/group_planner.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>

#include "kernels/base/error.h"
#include "trainer/conversion/head_factors.h"

namespace regroup {
namespace {

// One group's shared heads with what they lose, as they travel between ranks.
struct GroupResult {
  SharedHead keys, values;
  std::array<double, 4> sums{};  // lost and whole squares: of scores, of outputs
};

SharedHead shared_head(const HeadProducts& heads, Pooling pooling) {
  switch (pooling) {
    case Pooling::kMean:
      return mean_head(heads.heads(), heads.d_kv());
    case Pooling::kFirst:
      return first_head(heads.heads(), heads.d_kv());
    case Pooling::kRandom: {  // nothing of a fresh head is the parent's; one head stays
      SharedHead none = mean_head(heads.heads(), heads.d_kv());
      if (heads.heads() > 1) std::fill(none.combine.values.begin(), none.combine.values.end(), 0.0);
      return none;
    }
    case Pooling::kSpectral:
    case Pooling::kCalibrated:
      return merge_heads(heads);
  }
  throw InternalError("unknown pooling {}", static_cast<int>(pooling));
}

// One attention's heads in the measure in which losses are told, and in the one that the shared heads are
// made for: of kSpectral, which knows of no moments, another.
class Measures {
 public:
  Measures(const CheckpointReader& reader, const ModelConfig& parent, const AttentionSite& site,
           const SecondMoments* moments, Pooling pooling)
      : told_(reader, parent, site, moments), pooling_(pooling) {
    if (pooling == Pooling::kSpectral && moments != nullptr)
      plain_ = std::make_unique<SiteFactors>(reader, parent, site, nullptr);
  }
  const SiteFactors& told() const { return told_; }
  const SiteFactors& minimised() const { return plain_ ? *plain_ : told_; }
  bool differ() const { return plain_ != nullptr; }
  Pooling pooling() const { return pooling_; }

 private:
  SiteFactors told_;
  std::unique_ptr<const SiteFactors> plain_;  // null: the same
  Pooling pooling_;
};

GroupResult plan_group(const Measures& measures, std::span<const index_t> heads, Heartbeat& heartbeat) {
  GroupResult result;
  const auto merge = [&](HeadFactors (SiteFactors::*factors)(std::span<const index_t>) const, double* sums) {
    const HeadFactors minimised = (measures.minimised().*factors)(heads);
    SharedHead shared = shared_head(minimised.products, measures.pooling());
    const HeadFactors other = measures.differ() ? (measures.told().*factors)(heads) : HeadFactors();
    const HeadProducts& told = measures.differ() ? other.products : minimised.products;
    sums[0] = merging_loss(told, shared);
    sums[1] = merging_energy(told);
    if (merges_products(measures.pooling())) balance(minimised, shared);
    return shared;
  };
  result.keys = merge(&SiteFactors::scores, result.sums.data());
  heartbeat.beat("merging heads");
  result.values = merge(&SiteFactors::outputs, result.sums.data() + 2);
  return result;
}

void append(std::string& bytes, std::span<const double> values) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

void take(const std::string& bytes, std::size_t& at, std::span<double> values) {
  std::memcpy(values.data(), bytes.data() + at, values.size_bytes());
  at += values.size_bytes();
}

void append(std::string& bytes, const SharedHead& head) {
  append(bytes, head.combine.values);
  for (const Matrix& mix : head.mix) append(bytes, mix.values);
}

SharedHead take_head(const std::string& bytes, std::size_t& at, index_t heads, index_t d_kv) {
  SharedHead result = mean_head(heads, d_kv);  // of the right shapes
  take(bytes, at, result.combine.values);
  for (Matrix& mix : result.mix) take(bytes, at, mix.values);
  return result;
}

// The mixes of a group's value heads, each for all query heads that read it, as one matrix.
Matrix block_diagonal(const std::vector<Matrix>& mixes, index_t repeats) {
  const index_t d = mixes.front().rows;
  const index_t size = d * repeats * static_cast<index_t>(mixes.size());
  Matrix result(size, size);
  for (index_t at = 0; at < size; at += d) {
    const Matrix& mix = mixes[static_cast<std::size_t>(at / d / repeats)];
    for (index_t i = 0; i < d; ++i) std::copy(mix.row(i), mix.row(i) + d, result.row(at + i) + at);
  }
  return result;
}

struct FittedOutputs {
  Matrix outputs;
  std::array<double, 2> sums{};  // lost and whole squares
};

// trace(w x w^T)
double weighted_trace(const Matrix& w, const Matrix& x) {
  const Matrix wx = product(w, x);
  double sum = 0;
  for (std::size_t i = 0; i < w.values.size(); ++i) sum += wx.values[i] * w.values[i];
  return sum;
}

// See GroupPlanner::fit_outputs(). w: the parent's output weights of the group.
FittedOutputs fit(const Matrix& before, const Matrix& across, const Matrix& after, const Matrix& mixes,
                  const Matrix& w) {
  constexpr double kRidge = 1e-4;  // of the mean square of b
  double ridge = 0;
  for (index_t i = 0; i < after.rows; ++i) ridge += kRidge * after(i, i) / static_cast<double>(after.rows);
  if (!(ridge > 0)) return {.outputs = mixes, .sums = {0, weighted_trace(w, before)}};  // nothing was seen
  Matrix left = across, right = after;
  for (std::size_t i = 0; i < left.values.size(); ++i) left.values[i] += ridge * mixes.values[i];
  for (index_t i = 0; i < right.rows; ++i) right(i, i) += ridge;
  FittedOutputs result{.outputs = solve(right, left.transposed()).transposed()};
  // E|| a - M b ||^2 = E[a a^T] - M E[b a^T] - E[a b^T] M^T + M E[b b^T] M^T, under the trace.
  Matrix error = before;
  const Matrix mixed = product(result.outputs, across, Transpose::kNo, Transpose::kYes);
  const Matrix squared =
      product(product(result.outputs, after), result.outputs, Transpose::kNo, Transpose::kYes);
  for (index_t i = 0; i < error.rows; ++i) {
    for (index_t j = 0; j < error.columns; ++j) error(i, j) += squared(i, j) - mixed(i, j) - mixed(j, i);
  }
  result.sums = {std::max(0.0, weighted_trace(w, error)), weighted_trace(w, before)};
  return result;
}

// The loss of each pair that is this rank's turn, as a share of all heads', added to `losses`.
void add_pair_losses(const HeadProducts& minimised, const HeadProducts& told, Pooling pooling,
                     const ProcessGroup& world, Matrix& losses) {
  const double whole = merging_energy(told);
  if (whole == 0) return;
  index_t turn = 0;
  for (index_t i = 0; i < told.heads(); ++i) {
    for (index_t j = i + 1; j < told.heads(); ++j) {
      if (turn++ % world.size() != world.rank()) continue;
      world.heartbeat().beat("comparing heads");
      const std::array pair = {i, j};
      losses(i, j) += merging_loss(told.of(pair), shared_head(minimised.of(pair), pooling)) / whole;
      losses(j, i) = losses(i, j);
    }
  }
}

}  // namespace

bool merges_products(Pooling pooling) {
  return pooling == Pooling::kSpectral || pooling == Pooling::kCalibrated;
}

void GroupPlanner::plan(std::span<SiteConversion> sites, std::span<const SecondMoments> moments) const {
  std::string mine;
  world_.run_together([&] {
    index_t turn = 0;
    for (std::size_t s = 0; s < sites.size(); ++s) {
      std::optional<Measures> measures;
      const auto n = static_cast<std::size_t>(sites[s].heads_per_group());
      for (index_t g = 0; g < sites[s].target.kv_groups; ++g) {
        if (turn++ % world_.size() != world_.rank()) continue;
        world_.heartbeat().beat("merging heads");
        if (!measures) {
          measures.emplace(reader_, parent_, sites[s].parent, moments.empty() ? nullptr : &moments[s],
                           options_.pooling);
        }
        const auto heads = std::span(sites[s].order).subspan(static_cast<std::size_t>(g) * n, n);
        const GroupResult result = plan_group(*measures, heads, world_.heartbeat());
        append(mine, result.sums);
        if (!merges_products(options_.pooling)) continue;
        append(mine, result.keys);
        append(mine, result.values);
      }
    }
  });
  collect(sites, world_.all_gather(mine));
}

void GroupPlanner::collect(std::span<SiteConversion> sites, const std::vector<std::string>& bytes) const {
  std::vector<std::size_t> at(bytes.size());
  std::size_t turn = 0;
  for (SiteConversion& site : sites) {
    site.keys.clear();
    site.values.clear();
    site.outputs.clear();
    std::array<double, 4> sums{};
    for (index_t g = 0; g < site.target.kv_groups; ++g) {
      const std::size_t rank = turn++ % bytes.size();
      std::array<double, 4> of_group{};
      take(bytes[rank], at[rank], of_group);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += of_group[i];
      if (!merges_products(options_.pooling)) continue;
      site.keys.push_back(take_head(bytes[rank], at[rank], site.heads_per_group(), parent_.d_kv));
      site.values.push_back(take_head(bytes[rank], at[rank], site.heads_per_group(), parent_.d_kv));
    }
    site.score_loss = sums[1] > 0 ? sums[0] / sums[1] : 0;
    site.output_loss = sums[3] > 0 ? sums[2] / sums[3] : 0;
    site.score_error = sums[0] / static_cast<double>(site.query_heads);
  }
}

std::vector<std::vector<Matrix>> GroupPlanner::shared_values(std::span<const SiteConversion> sites) const {
  std::vector<std::vector<Matrix>> result;
  world_.run_together([&] {
    for (const SiteConversion& site : sites) {
      world_.heartbeat().beat("merging heads");
      std::vector<Matrix>& of_site = result.emplace_back();
      const index_t n = site.heads_per_group();
      for (index_t g = 0; g < site.target.kv_groups; ++g) {
        std::vector<Matrix> heads;
        for (index_t i = 0; i < n; ++i) {
          heads.push_back(read_head(reader_, site.parent.prefix + "v.weight",
                                    site.order[static_cast<std::size_t>(g * n + i)], parent_.d_kv,
                                    parent_.d_model));
        }
        of_site.push_back(product(site.values[static_cast<std::size_t>(g)].combine, stack(heads)));
      }
    }
  });
  return result;
}

// The parent's output weights of a group's query heads, side by side [d_model, m].
Matrix GroupPlanner::group_outputs(const SiteConversion& site, index_t group) const {
  return side_by_side(read_output_heads(reader_, site.parent.prefix + "o.weight", site.query_heads_of(group),
                                        parent_.d_kv, parent_.d_model));
}

void GroupPlanner::fit_outputs(std::span<SiteConversion> sites,
                               std::span<const OutputMoments> moments) const {
  // Of few groups the matrices are large: as many sites at a time as a message holds.
  constexpr index_t kMessage = index_t{1} << 30;
  const index_t inner = parent_.num_heads * parent_.d_kv;
  const auto at_once = static_cast<std::size_t>(std::max<index_t>(1, kMessage / (inner * inner * 8)));
  for (std::size_t begin = 0; begin < sites.size(); begin += at_once) {
    const std::size_t count = std::min(at_once, sites.size() - begin);
    fit_some(sites.subspan(begin, count), moments.subspan(begin, count));
  }
}

void GroupPlanner::fit_some(std::span<SiteConversion> sites, std::span<const OutputMoments> moments) const {
  std::string mine;
  world_.run_together([&] {
    index_t turn = 0;
    for (std::size_t s = 0; s < sites.size(); ++s) {
      const SiteConversion& site = sites[s];
      if (site.heads_per_group() == 1) continue;
      for (index_t g = 0; g < site.target.kv_groups; ++g) {
        if (turn++ % world_.size() != world_.rank()) continue;
        world_.heartbeat().beat("fitting outputs");
        const auto group = static_cast<std::size_t>(g);
        const FittedOutputs fitted =
            fit(moments[s].before[group], moments[s].across[group], moments[s].after[group],
                block_diagonal(site.values[group].mix, site.queries_per_head()), group_outputs(site, g));
        append(mine, fitted.sums);
        append(mine, fitted.outputs.values);
      }
    }
  });
  const std::vector<std::string> bytes = world_.all_gather(mine);
  std::vector<std::size_t> at(bytes.size());
  std::size_t turn = 0;
  for (SiteConversion& site : sites) {
    if (site.heads_per_group() == 1) continue;
    const index_t width = site.query_heads / site.target.kv_groups * parent_.d_kv;
    std::array<double, 2> sums{};
    for (index_t g = 0; g < site.target.kv_groups; ++g) {
      const std::size_t rank = turn++ % bytes.size();
      std::array<double, 2> of_group{};
      take(bytes[rank], at[rank], of_group);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += of_group[i];
      take(bytes[rank], at[rank], site.outputs.emplace_back(width, width).values);
    }
    site.output_loss = sums[1] > 0 ? sums[0] / sums[1] : 0;
  }
}

Matrix GroupPlanner::pair_losses(const SiteConversion& site, const SecondMoments* moments) const {
  Matrix losses(site.parent.kv_groups, site.parent.kv_groups);
  world_.run_together([&] {
    const Measures measures(reader_, parent_, site.parent, moments, options_.pooling);
    std::vector<index_t> all(static_cast<std::size_t>(site.parent.kv_groups));
    std::iota(all.begin(), all.end(), index_t{0});
    for (const auto factors : {&SiteFactors::scores, &SiteFactors::outputs}) {
      const HeadProducts minimised = (measures.minimised().*factors)(all).products;
      add_pair_losses(minimised, measures.differ() ? (measures.told().*factors)(all).products : minimised,
                      options_.pooling, world_, losses);
    }
  });
  world_.all_reduce(losses.values, ReduceOp::kSum);
  return losses;
}

}  // namespace regroup
