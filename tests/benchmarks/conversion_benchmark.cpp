// Converts one attention with calibrated heads, XXL's unless asked otherwise, and prints seconds and memory
// as JSON.
//   conversion_benchmark [groups=8] [heads=64] [d_kv=64] [d_model=4096]
// On one thread, as every rank converts. Weights and moments are random: what is done does not depend on
// them.
#include <array>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <span>

#include "kernels/base/error.h"
#include "kernels/base/random.h"
#include "parallel/process_group.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/conversion/group_planner.h"
#include "trainer/conversion/head_factors.h"
#include "trainer/formats/safetensors.h"

namespace regroup {
namespace {

using Numbers = std::map<std::string, index_t>;

Numbers parse(const std::vector<std::string>& arguments) {
  Numbers asked = {{"groups", 8}, {"heads", 64}, {"d_kv", 64}, {"d_model", 4096}};
  for (const std::string& argument : arguments) {
    const std::size_t equals = argument.find('=');
    const auto at = asked.find(argument.substr(0, equals));
    if (equals == std::string::npos || at == asked.end())
      throw UserError("{} is none of groups, heads, d_kv, d_model, as name=value", argument);
    at->second = std::stol(argument.substr(equals + 1));
  }
  if (asked["groups"] < 1 || asked["heads"] % asked["groups"] != 0)
    throw UserError("{} heads are not in {} groups", asked["heads"], asked["groups"]);
  return asked;
}

// Adds the seconds of `work` to `sum`: those of the processor, which are those of a clock where a core is
// free.
template <class Work>
auto timed(double& sum, Work&& work) {
  const std::clock_t begin = std::clock();
  auto result = work();
  sum += static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  return result;
}

// Cheap, of mean 0 and variance 1.
float draw(const Philox& philox, std::uint64_t index) {
  return static_cast<float>((philox.uniform(index) - 0.5) * std::sqrt(12.0));
}

// q, k, v and o of one attention, float32; row by row, so that the peak of memory is that of conversion.
void write_attention(const std::filesystem::path& file, Numbers& asked) {
  const index_t inner = asked["heads"] * asked["d_kv"], width = asked["d_model"];
  std::vector<StoredTensor> table;
  for (const char* name : {"q", "k", "v", "o"}) {
    std::vector<index_t> shape = {inner, width};
    if (*name == 'o') std::swap(shape[0], shape[1]);
    table.push_back({.name = std::string(name) + ".weight", .type = StoredType::kF32, .shape = shape});
  }
  const SafetensorsPlan plan = plan_safetensors(table, {});
  std::ofstream out(file, std::ios::binary);
  out << plan.bytes;
  std::uint64_t next = 0;
  const Philox philox(1, RandomPurpose::kTest);
  for (const StoredTensor& tensor : plan.tensors) {
    std::vector<float> row(static_cast<std::size_t>(tensor.shape[1]));
    for (index_t i = 0; i < tensor.shape[0]; ++i) {
      for (float& value : row) value = 0.02F * draw(philox, next++);
      out.write(reinterpret_cast<const char*>(row.data()),
                static_cast<std::streamsize>(row.size() * sizeof(float)));
    }
  }
  if (!out.flush()) throw SystemError("writing '{}'", file.string());
}

// x x^T / rank of random x, plus the identity.
std::vector<double> random_moments(std::uint64_t seed, index_t width) {
  constexpr index_t kRank = 64;
  const Philox philox(seed, RandomPurpose::kTest);
  Matrix x(width, kRank);
  for (std::size_t i = 0; i < x.values.size(); ++i) x.values[i] = draw(philox, i);
  Matrix moments = product(x, x, Transpose::kNo, Transpose::kYes);
  for (double& value : moments.values) value /= kRank;
  for (index_t i = 0; i < width; ++i) moments(i, i) += 1;
  return std::move(moments.values);
}

SecondMoments site_moments(index_t width) {
  SecondMoments moments = {.width = width,
                           .query = random_moments(2, width),
                           .key = {},
                           .attending = random_moments(3, width),
                           .attended = random_moments(4, width)};
  for (std::size_t i = 0; i < moments.attending.size(); ++i) moments.attending[i] += moments.attended[i];
  return moments;
}

// The most memory that the process has had, in MiB.
double peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

struct Seconds {
  double moments = 0, factors = 0, merging = 0, balancing = 0, pairs = 0, fitting = 0;
};

// One group's shared head of keys or values.
SharedHead merge_group(const HeadFactors& factors, Seconds& seconds) {
  SharedHead merged = timed(seconds.merging, [&] { return merge_heads(factors.products); });
  timed(seconds.merging, [&] { return merging_loss(factors.products, merged); });
  timed(seconds.balancing, [&] {
    balance(factors, merged);
    return 0;
  });
  if (factors.products.heads() > 1) {  // what grouping by similarity does for each two heads
    timed(seconds.pairs, [&] {
      const HeadProducts pair = factors.products.of(std::array<index_t, 2>{0, 1});
      return merging_loss(pair, merge_heads(pair));
    });
  }
  return merged;
}

// What the heads of each group pass on, by the parent's values and by the shared ones.
OutputMoments output_moments(index_t groups, index_t width) {
  OutputMoments result;
  for (index_t g = 0; g < groups; ++g) {
    for (std::vector<Matrix>* const moments : {&result.before, &result.across, &result.after}) {
      moments->emplace_back(width, width).values = random_moments(5, width);
    }
  }
  return result;
}

void run(Numbers asked) {
  const test::TemporaryDirectory directory;
  write_attention(directory / "attention.safetensors", asked);
  const CheckpointReader reader(directory / "attention.safetensors");
  const index_t groups = asked["groups"], heads = asked["heads"];
  ModelConfig parent;
  parent.d_model = asked["d_model"];
  parent.d_kv = asked["d_kv"];
  parent.num_heads = parent.kv_groups = heads;
  SiteConversion site = {
      .parent = {.kind = AttentionKind::kCross, .layer = 0, .prefix = "", .kv_groups = heads},
      .target = {.kind = AttentionKind::kCross, .layer = 0, .prefix = "", .kv_groups = groups},
      .query_heads = heads,
      .order = std::vector<index_t>(static_cast<std::size_t>(heads))};
  std::iota(site.order.begin(), site.order.end(), index_t{0});
  Seconds seconds;
  double moments_memory = 0;
  {
    const SecondMoments moments = site_moments(parent.d_model);
    moments_memory = peak_memory();
    const SiteFactors site_factors =
        timed(seconds.moments, [&] { return SiteFactors(reader, parent, site.parent, &moments); });
    const auto size = static_cast<std::size_t>(heads / groups);
    for (std::size_t begin = 0; begin < site.order.size(); begin += size) {
      const auto group = std::span(site.order).subspan(begin, size);
      site.keys.push_back(
          merge_group(timed(seconds.factors, [&] { return site_factors.scores(group); }), seconds));
      site.values.push_back(
          merge_group(timed(seconds.factors, [&] { return site_factors.outputs(group); }), seconds));
    }
  }
  const double merging_memory = peak_memory();
  const OutputMoments outputs = output_moments(groups, heads / groups * parent.d_kv);
  const ProcessGroup world = ProcessGroup::world();
  timed(seconds.fitting, [&] {
    GroupPlanner(world, reader, parent, {}).fit_outputs(std::span(&site, 1), std::span(&outputs, 1));
    return 0;
  });
  fmt::print(
      "{{\"groups\": {}, \"heads\": {}, \"d_kv\": {}, \"d_model\": {}, \"moments_s\": {:.2f}, \"factors_s\": "
      "{:.2f}, "
      "\"merging_s\": {:.2f}, \"balancing_s\": {:.2f}, \"fitting_s\": {:.2f}, \"site_s\": {:.2f}, "
      "\"pair_s\": {:.3f}, "
      "\"moments_mib\": {:.0f}, \"merging_mib\": {:.0f}, \"peak_mib\": {:.0f}}}\n",
      groups, heads, parent.d_kv, parent.d_model, seconds.moments, seconds.factors, seconds.merging,
      seconds.balancing, seconds.fitting,
      seconds.moments + seconds.factors + seconds.merging + seconds.balancing + seconds.fitting,
      seconds.pairs / static_cast<double>(groups), moments_memory, merging_memory, peak_memory());
}

}  // namespace
}  // namespace regroup

int main(int argc, char** argv) {
  const regroup::MpiEnvironment mpi;
  try {
    regroup::run(regroup::parse(std::vector<std::string>(argv + 1, argv + argc)));
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
