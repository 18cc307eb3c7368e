#include "trainer/run/parent_conversion.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/formats/t5x.h"
#include "trainer/run/calibration.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/model_options.h"

namespace regroup {
namespace {

// The files that say what a model is: of a checkpoint of this program trainer.json, which has the checksums
// of all the others; of T5X's the index and the arrays of parameters; the tensor files of others.
std::vector<std::filesystem::path> model_files(const std::filesystem::path& directory) {
  using std::filesystem::directory_iterator, std::filesystem::recursive_directory_iterator;
  if (!std::filesystem::is_directory(directory)) return {directory};
  if (std::filesystem::exists(directory / "trainer.json")) return {directory / "trainer.json"};
  if (!t5x_index(directory)) return CheckpointReader(directory).files();
  std::vector<std::filesystem::path> files;
  const auto add = [&](const std::filesystem::path& file) {
    constexpr std::size_t kMost = std::size_t{1} << 20;
    files.push_back(file);
    if (files.size() > kMost) throw UserError("{} has more than {} files", directory.string(), kMost);
  };
  for (const auto& entry : directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name == "checkpoint") add(entry.path());
    if (!entry.is_directory() || !name.starts_with("target.")) continue;
    for (const auto& part : recursive_directory_iterator(entry.path())) {
      if (part.is_regular_file()) add(part.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

// Of one file its checksum; of a few theirs, one after the other; of many the checksum of those.
std::string checksum_of(const ProcessGroup& world, const CheckpointSource& source) {
  std::string names;  // rank 0's, so that all look at the same
  world.run_on(0, [&] {
    nlohmann::json all = nlohmann::json::array();
    for (const auto& file : model_files(source.directory)) all.push_back(file.string());
    names = json_text(all);
  });
  std::vector<std::filesystem::path> files;
  for (const nlohmann::json& name : parse_json(world.broadcast(names))) {
    files.emplace_back(name.get<std::string>());
  }
  std::string text;
  for (const std::uint64_t sum : tree_checksums(world, files)) text += fmt::format("{:016x}", sum);
  constexpr std::size_t kFew = 64;
  if (files.size() <= kFew) return text;
  return fmt::format("{:016x}", checksum(std::as_bytes(std::span(text))));
}

ConversionProvenance provenance_of(const Options& options, const ProcessGroup& world,
                                   const CheckpointSource& source, const ParentData& data) {
  ConversionProvenance result{.parent = source.directory.string(),
                              .parent_checksum = checksum_of(world, source),
                              .pooling = options.pooling,
                              .grouping = options.grouping,
                              .kv_budget = options.kv_budget,
                              .corpus = {},
                              .seed = options.seed};
  if (data.training == nullptr) return result;
  result.corpus = fmt::format("{:016x}", data.corpus->fingerprint());
  result.calibration_samples = options.calibration_batches * options.batch_size;
  return result;
}

}  // namespace

ConversionOptions conversion_options(const Options& options) {
  return {.pooling = pooling_from_string(options.pooling),
          .grouping = options.grouping == "similarity" ? Grouping::kSimilarity : Grouping::kPosition,
          .budget = options.kv_budget == "uneven" ? Budget::kUneven : Budget::kEven,
          .seed = options.seed};
}

ParentConversion plan_parent(const Options& options, const ProcessGroup& world, Backend& backend,
                             const Mesh& mesh, const CheckpointSource& source, const ModelConfig& target,
                             const ParentData& data) {
  ParentConversion result;
  result.report.provenance = provenance_of(options, world, source, data);
  std::optional<ModelRunner> runner;
  if (data.training != nullptr || data.heldout != nullptr) {
    const Samples& samples = data.heldout != nullptr ? *data.heldout : *data.training;
    runner.emplace(backend, mesh, source.config,
                   runner_options(options, samples, data.micro_batch, /*train=*/false));
    load_weights(world, source, backend, runner->parameters());
  }
  if (data.heldout != nullptr) {
    result.report.parent_loss =
        evaluate(*runner, mesh, *data.heldout, options.evaluation_samples, data.micro_batch).mean();
  }
  const auto began = std::chrono::steady_clock::now();
  Calibration calibration;
  if (data.training != nullptr) {
    // Of a site's four moments while they are summed, and as they are returned.
    const index_t site_bytes = 64 * source.config.d_model * source.config.d_model;
    calibration.sites_at_once = options.calibration_memory > 0
                                    ? (options.calibration_memory << 20) / site_bytes
                                    : std::numeric_limits<index_t>::max();
    calibration.measure = [&](std::span<const index_t> sites) {
      return calibrate(*runner, mesh, world, *data.training,
                       {.samples = options.calibration_batches * options.batch_size,
                        .sites = std::vector<index_t>(sites.begin(), sites.end())});
    };
    calibration.outputs = [&](std::span<const SiteConversion> sites,
                              std::span<const std::vector<Matrix>> shared) {
      return calibrate_outputs(*runner, mesh, world, *data.training,
                               options.calibration_batches * options.batch_size, sites, shared);
    };
  }
  std::optional<CheckpointReader> reader;
  world.run_together([&] { reader.emplace(source.directory); });
  result.plan =
      plan_conversion(world, *reader, source.config, target, conversion_options(options), calibration);
  result.report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  result.report.parent = source.config;
  result.report.target = result.plan.target;
  for (const SiteConversion& site : result.plan.sites) {
    result.report.sites.push_back({.parent = site.parent,
                                   .target = site.target,
                                   .query_heads = site.query_heads,
                                   .order = site.order,
                                   .score_loss = site.score_loss,
                                   .output_loss = site.output_loss,
                                   .score_error = site.score_error});
  }
  return result;
}

void require_budget_fits(const Options& options, const ModelConfig& parent, int tensor_parallel) {
  if (options.kv_budget != "uneven") return;
  for (const AttentionSite& site : attention_sites(parent)) {
    if (site.kind == AttentionKind::kEncoderSelf) continue;
    for (const index_t groups : group_choices(site)) {
      if (groups % tensor_parallel == 0 || tensor_parallel % groups == 0) continue;
      throw UserError(
          "kv-budget = uneven may give an attention {} key/value groups, which {} tensor-parallel ranks "
          "cannot split; "
          "use a tensor-parallel that is a power of two, or kv-budget = even",
          groups, tensor_parallel);
    }
  }
}

std::vector<index_t> conversion_groups(const Options& options, const ModelConfig& parent,
                                       const ModelConfig& target) {
  std::vector<index_t> groups = parent.all_kv_groups();
  const std::vector<index_t> of_target = target.all_kv_groups();
  groups.insert(groups.end(), of_target.begin(), of_target.end());
  if (options.kv_budget != "uneven") return groups;
  for (const AttentionSite& site : attention_sites(parent)) {
    if (site.kind == AttentionKind::kEncoderSelf) continue;
    const std::vector<index_t> choices = group_choices(site);
    groups.insert(groups.end(), choices.begin(), choices.end());
  }
  return groups;
}

}  // namespace regroup
