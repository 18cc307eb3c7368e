#include "trainer/run/output_probe.h"

#include <algorithm>
#include <array>

namespace regroup {
namespace {

constexpr index_t kMoments = 3;  // of before, across, after

index_t wide_bytes(index_t elements) { return elements * size_of(DType::kFloat64); }

}  // namespace

OutputProbe::OutputProbe(ModelRunner& runner, const Mesh& mesh, std::span<const SiteConversion> sites,
                         std::span<const std::vector<Matrix>> shared)
    : runner_(runner),
      backend_(runner.backend()),
      mesh_(mesh),
      compute_(runner.options().compute),
      statistic_(stat_dtype(compute_)),
      heads_(runner.parameters().config().num_heads / mesh.tp_size()),
      model_heads_(runner.parameters().config().num_heads),
      d_kv_(runner.parameters().config().d_kv),
      width_(runner.parameters().config().d_model) {
  const ModelRunner::Options& options = runner.options();
  const index_t inputs = options.micro_batch * options.inputs_length;
  const index_t targets = options.micro_batch * options.targets_length;
  inputs_.memory = backend_.allocate(inputs * size_of(DType::kInt32));
  targets_.memory = backend_.allocate(targets * size_of(DType::kInt32));
  const index_t tokens = std::max(inputs, targets);
  const index_t inner = heads_ * d_kv_, all = model_heads_ * d_kv_;
  values_ = backend_.allocate(tokens * inner * size_of(compute_));
  out_ = backend_.allocate(tokens * inner * size_of(compute_));
  log_sum_exp_ = backend_.allocate(tokens * heads_ * size_of(statistic_));
  for (Buffer* wide : {&gathered_, &before_, &after_})
    *wide = backend_.allocate(tokens * all * size_of(compute_));
  index_t widest = 0;
  for (std::size_t s = 0; s < sites.size(); ++s) {
    add_site(sites[s], shared[s]);
    widest = std::max(widest, sites_.back().width);
  }
  product_ = backend_.allocate(widest * widest * size_of(statistic_));
  wide_product_ = backend_.allocate(wide_bytes(widest * widest));
}

void OutputProbe::add_site(const SiteConversion& conversion, std::span<const Matrix> shared) {
  const std::vector<AttentionSite> all = attention_sites(runner_.parameters().config());
  const auto found = std::find_if(all.begin(), all.end(), [&conversion](const AttentionSite& other) {
    return other.prefix == conversion.parent.prefix;
  });
  Site site{.place = found - all.begin(),
            .kind = conversion.parent.kind,
            .groups = conversion.target.kv_groups,
            .width = conversion.query_heads / conversion.target.kv_groups * d_kv_,
            .slots = {},
            .parent_values = runner_.parameters().parameter(conversion.parent.prefix + "v.weight").weight,
            .shared_values = {},
            .sums = {}};
  std::vector<index_t> slot_of(static_cast<std::size_t>(model_heads_));
  for (index_t slot = 0; slot < model_heads_; ++slot) {
    slot_of[static_cast<std::size_t>(conversion.query_head_in(slot))] = slot;
  }
  const index_t first = heads_ * mesh_.tp_rank();
  for (index_t h = first; h < first + heads_; ++h) site.slots.push_back(slot_of[static_cast<std::size_t>(h)]);

  // Of each key/value head that this rank holds, the shared head of the group that it went into.
  const index_t queries = conversion.queries_per_head(), held = site.parent_values[0] / d_kv_;
  std::vector<Matrix> rows;
  for (index_t i = 0; i < held; ++i) {
    const index_t slot = slot_of[static_cast<std::size_t>((first / queries + i) * queries)];
    rows.push_back(shared[static_cast<std::size_t>(slot * d_kv_ / site.width)]);
  }
  const Matrix stacked = stack(rows);
  const Buffer wide = backend_.allocate(wide_bytes(stacked.rows * width_));
  const Tensor wide_tensor = wide.tensor(DType::kFloat64, {stacked.rows, width_});
  backend_.copy_from_host(stacked.values.data(), wide_tensor);
  site.shared_values = backend_.allocate(stacked.rows * width_ * size_of(compute_));
  backend_.cast(wide_tensor, site.shared_values.tensor(compute_, {stacked.rows, width_}));
  backend_.synchronize();

  // Group g of site n is tp rank (g + n) % tp's.
  const auto ranks = static_cast<index_t>(mesh_.tp_size());
  site.first_group = (mesh_.tp_rank() - std::ssize(sites_) % ranks + ranks) % ranks;
  index_t mine = 0;
  for (index_t g = site.first_group; g < site.groups; g += mesh_.tp_size()) ++mine;
  site.sums = backend_.allocate(wide_bytes(std::max<index_t>(1, mine) * kMoments * site.width * site.width));
  sites_.push_back(std::move(site));
}

void OutputProbe::begin(const Batch& batch) {
  mark(inputs_, batch.input_ids);
  mark(targets_, batch.targets);  // position t of the decoder is there to write target t
}

void OutputProbe::mark(Rows& rows, const std::vector<std::int32_t>& ids) {
  host_rows_.clear();
  for (std::size_t row = 0; row < ids.size(); ++row) {
    host_rows_.push_back(ids[row] != 0 ? static_cast<std::int32_t>(row) : -1);
    if (ids[row] != 0) rows.seen += 1;
  }
  rows.rows = rows.memory.tensor(DType::kInt32, {static_cast<index_t>(ids.size())});
  backend_.copy_from_host(host_rows_.data(), rows.rows);
}

void OutputProbe::observe(Step& /*step*/, const View& view) {
  const auto site =
      std::find_if(sites_.begin(), sites_.end(), [&view](const Site& one) { return one.place == view.site; });
  if (site == sites_.end()) return;
  mesh_.heartbeat().beat("calibrating");
  const Rows& queries = site->kind == AttentionKind::kEncoderSelf ? inputs_ : targets_;
  const Tensor shared = site->shared_values.tensor(compute_, {site->parent_values[0], width_});
  const Tensor before = passed_on(view, *site, site->parent_values, queries, before_);
  const Tensor after = passed_on(view, *site, shared, queries, after_);
  index_t mine = 0;
  for (index_t g = site->first_group; g < site->groups; g += mesh_.tp_size(), ++mine) {
    const Tensor a = before.slice(1, g * site->width, (g + 1) * site->width);
    const Tensor b = after.slice(1, g * site->width, (g + 1) * site->width);
    const auto sum = [&](index_t moment) {
      return site->sums.tensor(DType::kFloat64, {site->width, site->width},
                               wide_bytes((mine * kMoments + moment) * site->width * site->width));
    };
    add(a, a, sum(0));
    add(a, b, sum(1));
    add(b, b, sum(2));
  }
}

// What all query heads of all ranks pass on of these values, in the order of slots, T [B Q, H C]; 0 for
// padding.
Tensor OutputProbe::passed_on(const View& view, const Site& site, Tensor values, const Rows& queries,
                              Buffer& wide) {
  const index_t batch = view.batch, length = view.q[1], groups = view.k[2];
  const index_t rows = batch * length, all = model_heads_ * d_kv_;
  const Tensor v = values_.tensor(compute_, {view.key_input[0], groups * d_kv_});
  backend_.matmul(view.key_input, values, v, {.transpose_b = true});
  const Tensor out = out_.tensor(compute_, {rows, heads_ * d_kv_});
  backend_.attention(view.q, view.k, v.reshape({batch, view.k[1], groups, d_kv_}), view.bias, view.key_mask,
                     out.reshape({batch, length, heads_, d_kv_}),
                     log_sum_exp_.tensor(statistic_, {batch, heads_, length}), view.options);
  const Tensor gathered = gathered_.tensor(compute_, {rows, all});
  backend_.fill_zero(gathered);
  for (index_t h = 0; h < heads_; ++h) {
    const index_t slot = site.slots[static_cast<std::size_t>(h)];
    backend_.copy(out.slice(1, h * d_kv_, (h + 1) * d_kv_),
                  gathered.slice(1, slot * d_kv_, (slot + 1) * d_kv_));
  }
  mesh_.tp().all_reduce(gathered);
  const Tensor result = wide.tensor(compute_, {rows, all});
  backend_.embedding(queries.rows, gathered, 0, result);
  return result;
}

// sum += a^T b.
void OutputProbe::add(Tensor a, Tensor b, Tensor sum) {
  const Tensor product = product_.tensor(statistic_, {a[1], b[1]});
  backend_.matmul(a, b, product, {.transpose_a = true});
  const Tensor wide = wide_product_.tensor(DType::kFloat64, {a[1], b[1]});
  backend_.cast(product, wide);
  backend_.add(sum, wide, sum);
}

std::vector<OutputMoments> OutputProbe::take(const ProcessGroup& world) {
  // Ranks of one model have seen the same tokens.
  const double share = 1.0 / mesh_.tp_size();
  std::array<double, 2> seen = {inputs_.seen * share, targets_.seen * share};
  world.all_reduce(seen, ReduceOp::kSum);
  std::vector<OutputMoments> result;
  for (const Site& site : sites_) {
    const double count = std::max(1.0, seen[site.kind == AttentionKind::kEncoderSelf ? 0 : 1]);
    OutputMoments& moments = result.emplace_back();
    const std::array<std::vector<Matrix>*, kMoments> all = {&moments.before, &moments.across, &moments.after};
    for (index_t g = 0; g < site.groups; ++g) {
      for (index_t m = 0; m < kMoments; ++m) {
        Matrix& moment = all[static_cast<std::size_t>(m)]->emplace_back(site.width, site.width);
        if (g % mesh_.tp_size() == site.first_group) {
          const index_t at = (g / mesh_.tp_size() * kMoments + m) * site.width * site.width;
          backend_.copy_to_host(site.sums.tensor(DType::kFloat64, {site.width, site.width}, wide_bytes(at)),
                                moment.values.data());
        }
        world.all_reduce(moment.values, ReduceOp::kSum);
        for (double& value : moment.values) value /= count;
      }
    }
  }
  return result;
}

}  // namespace regroup
