// What a conversion did: for people, for scripts, and for the checkpoint that comes of it.
#pragma once

#include <filesystem>
#include <limits>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "trainer/conversion/conversion_plan.h"
#include "trainer/run/loss_plot.h"

namespace regroup {

// Where a converted model comes from; kept in its trainer.json.
struct ConversionProvenance {
  std::string parent;  // directory
  std::string
      parent_checksum;  // of its trainer.json, which names those of its files; else of its model files
  std::string pooling, grouping, kv_budget;
  std::string corpus;  // fingerprint of the calibration's, "" without one
  std::int64_t calibration_samples = 0;
  std::uint64_t seed = 0;  // of the samples' order and of fresh heads
};
nlohmann::json to_json(const ConversionProvenance& provenance);

struct ConversionReport {
  ConversionProvenance provenance;
  ModelConfig parent, target;
  std::vector<SiteConversion> sites;  // without their matrices
  // Held-out, nats per target; NaN where not measured.
  double parent_loss = std::numeric_limits<double>::quiet_NaN();
  double converted_loss = std::numeric_limits<double>::quiet_NaN();
  double seconds = 0;  // of calibration and plan
};

// Bytes that decoding keeps in bfloat16: for every token written (keys and values of self-attention) and for
// every input token (of cross-attention).
struct CacheBytes {
  index_t per_target = 0, per_input = 0;
};
CacheBytes cache_bytes(const ModelConfig& config);

nlohmann::json to_json(const ConversionReport& report);
// A Markdown table by attention, and lines on loss, cache and time.
std::string conversion_table(const ConversionReport& report);
// Shares lost by layer: scores and outputs, of each kind of attention.
LossPlot conversion_plot(const ConversionReport& report);

// conversion.json and conversion.svg in `directory`. UserError where they cannot be written.
void write_conversion_report(const std::filesystem::path& directory, const ConversionReport& report);

}  // namespace regroup
