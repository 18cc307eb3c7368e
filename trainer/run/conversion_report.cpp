#include "trainer/run/conversion_report.h"

#include <array>
#include <cmath>
#include <utility>

#include "kernels/base/file.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

std::string name_of(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kEncoderSelf:
      return "encoder self";
    case AttentionKind::kDecoderSelf:
      return "decoder self";
    case AttentionKind::kCross:
      return "cross";
  }
  throw InternalError("unknown attention {}", static_cast<int>(kind));
}

// JSON has no NaN.
nlohmann::json number_or_null(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
}

}  // namespace

nlohmann::json to_json(const ConversionProvenance& p) {
  nlohmann::json json = {{"parent", p.parent},       {"parent_checksum", p.parent_checksum},
                         {"pooling", p.pooling},     {"grouping", p.grouping},
                         {"kv_budget", p.kv_budget}, {"seed", p.seed}};
  if (p.calibration_samples > 0) {
    json["calibration"] = {{"corpus", p.corpus}, {"samples", p.calibration_samples}};
  }
  return json;
}

CacheBytes cache_bytes(const ModelConfig& config) {
  constexpr index_t kKeyAndValue = 2, kBytes = 2;
  CacheBytes bytes;
  for (index_t layer = 0; layer < config.num_decoder_layers; ++layer) {
    bytes.per_target += kKeyAndValue * kBytes * config.self_groups(layer) * config.d_kv;
    bytes.per_input += kKeyAndValue * kBytes * config.cross_groups(layer) * config.d_kv;
  }
  return bytes;
}

nlohmann::json to_json(const ConversionReport& report) {
  nlohmann::json sites = nlohmann::json::array();
  for (const SiteConversion& site : report.sites) {
    sites.push_back({{"attention", site.parent.prefix.substr(0, site.parent.prefix.size() - 1)},
                     {"kind", name_of(site.parent.kind)},
                     {"layer", site.parent.layer},
                     {"groups_before", site.parent.kv_groups},
                     {"groups_after", site.target.kv_groups},
                     {"heads", site.order},
                     {"score_error", std::sqrt(site.score_loss)},
                     {"output_error", std::sqrt(site.output_loss)}});
  }
  const auto cache = [](const ModelConfig& config) {
    const CacheBytes bytes = cache_bytes(config);
    return nlohmann::json{{"per_target_token", bytes.per_target}, {"per_input_token", bytes.per_input}};
  };
  return {
      {"provenance", to_json(report.provenance)},
      {"kv_groups", {{"before", report.parent.kv_groups}, {"after", report.target.kv_groups}}},
      {"parameters", {{"before", parameter_count(report.parent)}, {"after", parameter_count(report.target)}}},
      {"kv_cache_bytes", {{"before", cache(report.parent)}, {"after", cache(report.target)}}},
      {"held_out_loss",
       {{"parent", number_or_null(report.parent_loss)},
        {"converted", number_or_null(report.converted_loss)}}},
      {"seconds", report.seconds},
      {"attentions", sites}};
}

std::string conversion_table(const ConversionReport& report) {
  std::string text =
      "| attention | layer | groups | relative error of scores | of outputs |\n|---|---|---|---|---|\n";
  for (const SiteConversion& site : report.sites) {
    text += fmt::format("| {} | {} | {} -> {} | {:.4f} | {:.4f} |\n", name_of(site.parent.kind),
                        site.parent.layer, site.parent.kv_groups, site.target.kv_groups,
                        std::sqrt(site.score_loss), std::sqrt(site.output_loss));
  }
  const CacheBytes before = cache_bytes(report.parent), after = cache_bytes(report.target);
  text += fmt::format(
      "\n{} conversion in {:.1f} s; key/value cache {} -> {} bytes a target token, {} -> {} an input token\n",
      report.provenance.pooling, report.seconds, before.per_target, after.per_target, before.per_input,
      after.per_input);
  if (std::isfinite(report.parent_loss)) {
    text += fmt::format("held-out loss {:.4f} -> {:.4f} ({:+.4f})\n", report.parent_loss,
                        report.converted_loss, report.converted_loss - report.parent_loss);
  }
  return text;
}

LossPlot conversion_plot(const ConversionReport& report) {
  LossPlot plot{
      .title = fmt::format("{} conversion to {} groups", report.provenance.pooling, report.target.kv_groups),
      .x_label = "layer",
      .y_label = "relative error"};
  for (const AttentionKind kind :
       {AttentionKind::kEncoderSelf, AttentionKind::kDecoderSelf, AttentionKind::kCross}) {
    PlotSeries scores{.name = name_of(kind) + ", scores", .style = PlotStyle::kMarkers};
    PlotSeries outputs{.name = name_of(kind) + ", outputs", .style = PlotStyle::kMarkers};
    for (const SiteConversion& site : report.sites) {
      if (site.parent.kind != kind) continue;
      const auto layer = static_cast<double>(site.parent.layer);
      scores.points.push_back({layer, std::sqrt(site.score_loss)});
      outputs.points.push_back({layer, std::sqrt(site.output_loss)});
    }
    if (scores.points.empty()) continue;
    plot.series.push_back(std::move(scores));
    plot.series.push_back(std::move(outputs));
  }
  return plot;
}

void write_conversion_report(const std::filesystem::path& directory, const ConversionReport& report) {
  write_text(directory / "conversion.json", json_text(to_json(report), 2) + "\n");
  write_loss_plot(directory / "conversion.svg", conversion_plot(report));
}

}  // namespace regroup
