#include "trainer/run/moment_probe.h"

#include <algorithm>
#include <array>

namespace regroup {
namespace {

// Head h of rows of heads, as a tensor of one head.
Tensor head_of(Tensor heads, index_t h) { return heads.slice(2, h, h + 1); }

// Columns [first, first + d_kv) of x [B L, D] as values of one head.
Tensor columns_of(Tensor x, index_t batch, index_t first, index_t d_kv) {
  return x.slice(1, first, first + d_kv).reshape({batch, x[0] / batch, 1, d_kv});
}

// Where row blocks of `width` rows begin for `rank` of `ranks`.
index_t block_begin(index_t width, int rank, int ranks) { return width * rank / ranks; }

// The mean of a matrix and its transpose: a sum of x x^T whose two halves were rounded apart.
void symmetrise(std::vector<double>& matrix, index_t width) {
  double* const m = matrix.data();
  for (index_t i = 0; i < width; ++i) {
    for (index_t j = 0; j < i; ++j) {
      m[i * width + j] = m[j * width + i] = 0.5 * (m[i * width + j] + m[j * width + i]);
    }
  }
}

}  // namespace

MomentProbe::Tokens MomentProbe::tokens_of(Backend& backend, index_t most) {
  Tokens tokens;
  tokens.rows_memory = backend.allocate(most * size_of(DType::kInt32));
  tokens.padding_memory = backend.allocate(most * size_of(DType::kInt32));
  return tokens;
}

MomentProbe::MomentProbe(ModelRunner& runner, const Mesh& mesh, const std::vector<index_t>& sites)
    : runner_(runner),
      backend_(runner.backend()),
      mesh_(mesh),
      all_sites_(attention_sites(runner.parameters().config())),
      sites_(sites),
      compute_(runner.options().compute),
      statistic_(stat_dtype(compute_)),
      width_(runner.parameters().config().d_model),
      heads_(runner.parameters().config().num_heads / mesh.tp_size()),
      model_heads_(runner.parameters().config().num_heads),
      d_kv_(runner.parameters().config().d_kv),
      first_row_(block_begin(width_, mesh.tp_rank(), mesh.tp_size())),
      last_row_(block_begin(width_, mesh.tp_rank() + 1, mesh.tp_size())) {
  if (d_kv_ > width_) {
    throw UserError("calibration cannot measure a model whose d_kv = {} is more than its d_model = {}", d_kv_,
                    width_);
  }
  const ModelRunner::Options& options = runner.options();
  inputs_ = tokens_of(backend_, options.micro_batch * options.inputs_length);
  targets_ = tokens_of(backend_, options.micro_batch * options.targets_length);
  const index_t tokens = options.micro_batch * std::max(options.inputs_length, options.targets_length);
  const index_t inner = heads_ * d_kv_;
  const auto allocate = [this](DType dtype, index_t elements) {
    return backend_.allocate(elements * size_of(dtype));
  };
  product_ = allocate(statistic_, width_ * width_);
  wide_product_ = allocate(DType::kFloat64, width_ * width_);
  for (Buffer* rows : {&rows_, &context_, &zeros_}) *rows = allocate(compute_, tokens * width_);
  for (Buffer* rows : {&out_, &dout_, &dq_, &dk_, &dv_}) *rows = allocate(compute_, tokens * inner);
  log_sum_exp_ = allocate(statistic_, tokens * heads_);
  weights_ = allocate(statistic_, tokens);
  discard_ = allocate(statistic_, width_);
  const index_t most = std::max(width_, inner);
  ones_ = allocate(compute_, most);
  const std::vector<double> host_ones(static_cast<std::size_t>(most), 1.0);
  const Buffer wide_ones = allocate(DType::kFloat64, most);
  backend_.copy_from_host(host_ones.data(), wide_ones.tensor(DType::kFloat64, {most}));
  backend_.cast(wide_ones.tensor(DType::kFloat64, {most}), ones_.tensor(compute_, {most}));
  backend_.synchronize();

  const index_t block = last_row_ - first_row_, rows = 3 * block + width_;
  const auto count = static_cast<index_t>(sites_.size());
  sums_memory_ = allocate(DType::kFloat64, count * rows * width_);
  for (index_t n = 0; n < count; ++n) {
    const Tensor all =
        sums_memory_.tensor(DType::kFloat64, {rows, width_}, n * rows * width_ * size_of(DType::kFloat64));
    sums_.push_back({.query = all.slice(0, 0, block),
                     .key = all.slice(0, block, 2 * block),
                     .attending = all.slice(0, 2 * block, 3 * block),
                     .attended = all.slice(0, 3 * block, rows)});
  }
}

void MomentProbe::begin(const Batch& batch) {
  mark(inputs_, batch.input_ids);
  mark(targets_, batch.targets);  // position t of the decoder is there to write target t
}

void MomentProbe::mark(Tokens& tokens, const std::vector<std::int32_t>& ids) {
  host_rows_.clear();
  host_padding_.clear();
  for (std::size_t row = 0; row < ids.size(); ++row) {
    const bool real = ids[row] != 0;
    host_rows_.push_back(real ? static_cast<std::int32_t>(row) : -1);
    host_padding_.push_back(real ? 0 : 1);
    if (real) tokens.seen += 1;
  }
  tokens.rows = tokens.rows_memory.tensor(DType::kInt32, {static_cast<index_t>(ids.size())});
  tokens.padding = tokens.padding_memory.tensor(DType::kInt32, {static_cast<index_t>(ids.size())});
  backend_.copy_from_host(host_rows_.data(), tokens.rows);
  backend_.copy_from_host(host_padding_.data(), tokens.padding);
}

void MomentProbe::observe(Step& /*step*/, const View& view) {
  const auto place = std::find(sites_.begin(), sites_.end(), view.site);
  if (place == sites_.end()) return;
  const AttentionKind kind = all_sites_[static_cast<std::size_t>(view.site)].kind;
  const Tokens& queries = kind == AttentionKind::kEncoderSelf ? inputs_ : targets_;
  const Tokens& keys = kind == AttentionKind::kDecoderSelf ? targets_ : inputs_;
  const Sums& sums = sums_[static_cast<std::size_t>(place - sites_.begin())];
  mesh_.heartbeat().beat("calibrating");
  const Tensor x = real_rows(view.query_input, queries);
  add(my_columns(x), x, sums.query);
  const Tensor y = real_rows(view.key_input, keys);
  add(my_columns(y), y, sums.key);
  add_attending(view, queries, sums.attending);
  add_attended(view, queries, sums.attended);
}

// x with zeros for padding: the same shapes for every batch, which devices choose their ways of working by.
Tensor MomentProbe::real_rows(Tensor x, const Tokens& tokens) {
  const Tensor rows = rows_.tensor(compute_, {x[0], width_});
  backend_.embedding(tokens.rows, x, 0, rows);
  return rows;
}

// sum += a^T b.
void MomentProbe::add(Tensor a, Tensor b, Tensor sum) {
  const Tensor product = product_.tensor(statistic_, {a[1], b[1]});
  backend_.matmul(a, b, product, {.transpose_a = true});
  const Tensor wide = wide_product_.tensor(DType::kFloat64, {a[1], b[1]});
  backend_.cast(product, wide);
  backend_.add(sum, wide, sum);
}

// sum += Y^T diag(w) Y with w_j = C sum_ih p_ij. With a gradient of 1 for every output of a real query, the
// gradient of value j is w_j / C in each of its C columns and whatever the values are: here, the keys.
void MomentProbe::add_attending(const View& view, const Tokens& queries, Tensor sum) {
  const index_t batch = view.batch, length = view.q[1], inner = heads_ * d_kv_, groups = view.k[2];
  const index_t keys = view.key_input[0], group_columns = groups * d_kv_;
  const auto heads = [&](const Buffer& buffer) {
    return buffer.tensor(compute_, {batch, length, heads_, d_kv_});
  };
  const auto grouped = [&](const Buffer& buffer) {
    return buffer.tensor(compute_, {batch, view.k[1], groups, d_kv_});
  };
  const Tensor log_sum_exp = log_sum_exp_.tensor(statistic_, {batch, heads_, length});
  backend_.embedding(queries.padding, ones_.tensor(compute_, {1, inner}), 0,
                     dout_.tensor(compute_, {batch * length, inner}));
  backend_.attention(view.q, view.k, view.k, view.bias, view.key_mask, heads(out_), log_sum_exp,
                     view.options);
  backend_.attention_backward(heads(dout_), view.q, view.k, view.k, view.bias, view.key_mask, heads(out_),
                              log_sum_exp, heads(dq_), grouped(dk_), grouped(dv_), {}, view.options);
  backend_.matmul(dv_.tensor(compute_, {keys, group_columns}), ones_.tensor(compute_, {group_columns, 1}),
                  weights_.tensor(statistic_, {keys, 1}));
  const Tensor weights = weights_.tensor(statistic_, {keys});
  mesh_.tp().all_reduce(weights);
  // Of a norm whose input is 0, the backward pass is the multiplication of rows.
  const Tensor weighted = context_.tensor(compute_, {keys, width_});
  backend_.rms_norm_backward(view.key_input, zeros_.tensor(compute_, {keys, width_}),
                             ones_.tensor(compute_, {width_}), weights, {}, weighted,
                             discard_.tensor(statistic_, {width_}));
  add(my_columns(view.key_input), weighted, sum);
}

// sum += sum_h Z_h^T Z_h over this rank's heads: Z_h is what head h makes of the inputs as values, d_kv
// columns at a time.
void MomentProbe::add_attended(const View& view, const Tokens& queries, Tensor sum) {
  const index_t batch = view.batch, length = view.q[1];
  const index_t heads_per_group = heads_ / view.k[2];
  const Tensor log_sum_exp = log_sum_exp_.tensor(statistic_, {batch, 1, length});
  const Tensor context = context_.tensor(compute_, {batch * length, width_});
  const Tensor product = product_.tensor(statistic_, {width_, width_});
  for (index_t h = 0; h < heads_; ++h) {
    mesh_.heartbeat().beat("calibrating");
    const Tensor bias = view.bias ? view.bias.slice(0, h, h + 1) : Tensor();
    for (index_t column = 0; column < width_; column += d_kv_) {
      const index_t first = std::min(column, width_ - d_kv_);  // the last ones may be there already
      backend_.attention(head_of(view.q, h), head_of(view.k, h / heads_per_group),
                         columns_of(view.key_input, batch, first, d_kv_), bias, view.key_mask,
                         columns_of(context, batch, first, d_kv_), log_sum_exp, view.options);
    }
    const Tensor z = real_rows(context, queries);
    backend_.matmul(z, z, product, {.transpose_a = true, .accumulate = h > 0});
  }
  const Tensor wide = wide_product_.tensor(DType::kFloat64, {width_, width_});
  backend_.cast(product, wide);
  backend_.add(sum, wide, sum);
}

// A whole moment from the ranks' sums: a block of rows each, or a part of every row.
std::vector<double> MomentProbe::summed(const ProcessGroup& world, Tensor sum, double count) const {
  std::vector<double> moment(static_cast<std::size_t>(width_ * width_));
  const bool block = sum[0] < width_;
  backend_.copy_to_host(sum, moment.data() + (block ? first_row_ * width_ : 0));
  world.all_reduce(moment, ReduceOp::kSum);
  for (double& element : moment) element /= std::max(count, 1.0);
  symmetrise(moment, width_);
  return moment;
}

std::vector<SecondMoments> MomentProbe::take(const ProcessGroup& world) {
  // Ranks of one model have seen the same tokens.
  const double share = 1.0 / mesh_.tp_size();
  std::array<double, 2> seen = {inputs_.seen * share, targets_.seen * share};
  world.all_reduce(seen, ReduceOp::kSum);
  std::vector<SecondMoments> moments;
  for (std::size_t n = 0; n < sites_.size(); ++n) {
    const AttentionKind kind = all_sites_[static_cast<std::size_t>(sites_[n])].kind;
    const double queries = seen[kind == AttentionKind::kEncoderSelf ? 0 : 1];
    const double keys = seen[kind == AttentionKind::kDecoderSelf ? 1 : 0];
    const double attentions = queries * static_cast<double>(model_heads_);
    const Sums& sums = sums_[n];
    moments.push_back({.width = width_,
                       .query = summed(world, sums.query, queries),
                       .key = summed(world, sums.key, keys),
                       .attending = summed(world, sums.attending, attentions * static_cast<double>(d_kv_)),
                       .attended = summed(world, sums.attended, attentions)});
  }
  return moments;
}

}  // namespace regroup
