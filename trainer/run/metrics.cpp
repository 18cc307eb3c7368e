#include "trainer/run/metrics.h"

#include <cerrno>
#include <cmath>
#include <limits>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

// JSON has no NaN or infinity; the names are those of JavaScript, which Python's float() reads too.
ordered_json to_json(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return value;
}

double to_double(const json& value) {
  if (value == "NaN") return std::numeric_limits<double>::quiet_NaN();
  if (value == "Infinity") return std::numeric_limits<double>::infinity();
  if (value == "-Infinity") return -std::numeric_limits<double>::infinity();
  return value.get<double>();
}

void read_field(const json& line, const char* name, double& field) {
  if (const auto found = line.find(name); found != line.end()) field = to_double(*found);
}
template <class T>
void read_field(const json& line, const char* name, T& field) {
  if (const auto found = line.find(name); found != line.end()) found->get_to(field);
}

StepMetrics step_of(const json& line) {
  StepMetrics m;
  read_field(line, "step", m.step);
  read_field(line, "total_steps", m.total_steps);
  read_field(line, "loss", m.loss);
  read_field(line, "z_loss", m.z_loss);
  read_field(line, "learning_rate", m.learning_rate);
  read_field(line, "gradient_norm", m.gradient_norm);
  read_field(line, "tokens_per_second", m.tokens_per_second);
  read_field(line, "share_of_peak", m.share_of_peak);
  read_field(line, "data_wait_share", m.data_wait_share);
  read_field(line, "seconds_per_step", m.seconds_per_step);
  read_field(line, "samples", m.samples);
  return m;
}

EvaluationMetrics evaluation_of(const json& line) {
  EvaluationMetrics m;
  read_field(line, "step", m.step);
  read_field(line, "name", m.name);
  read_field(line, "loss", m.loss);
  read_field(line, "tokens", m.tokens);
  if (const auto scores = line.find("scores"); scores != line.end()) {
    for (const auto& [name, value] : scores->items()) m.scores[name] = to_double(value);
  }
  return m;
}

EventMetrics event_of(const json& line) {
  EventMetrics m;
  read_field(line, "step", m.step);
  read_field(line, "name", m.name);
  read_field(line, "detail", m.detail);
  read_field(line, "processor", m.processor);
  read_field(line, "cpu_level", m.cpu_level);
  read_field(line, "precision", m.precision);
  return m;
}

std::string to_line(const ordered_json& object) {
  // Text from outside (a path, a host's message) may not be UTF-8; it must not cost the run its metrics.
  return object.dump(-1, ' ', false, ordered_json::error_handler_t::replace) + '\n';
}

// Calls visit(object, step, kind) for each line, until it returns false or the file ends. Returns the number
// of bytes of the lines for which it returned true. A last line without its newline is torn and not visited.
template <class Visit>
std::uintmax_t visit_lines(const std::filesystem::path& path, const Visit& visit) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw_file_error("read the metrics", path, errno);
  std::uintmax_t bytes = 0;
  std::string text;
  for (std::int64_t number = 1; std::getline(file, text) && !file.eof(); ++number) {
    try {
      const json object = json::parse(text);
      if (!visit(object, object.at("step").get<std::int64_t>(), object.at("kind").get<std::string>())) break;
    } catch (const json::exception&) {
      throw UserError("{}:{}: not a metrics line; repair it or move the file aside", path.string(), number);
    }
    bytes += text.size() + 1;
  }
  return bytes;
}

void cut_after(const std::filesystem::path& path, std::int64_t step) {
  if (!std::filesystem::exists(path)) return;
  const auto keep = visit_lines(
      path, [&](const json&, std::int64_t line_step, const std::string&) { return line_step <= step; });
  std::error_code error;
  std::filesystem::resize_file(path, keep, error);
  if (error) throw_file_error("shorten the metrics", path, error.value());
}

}  // namespace

MetricsFile::MetricsFile(std::filesystem::path path, std::optional<std::int64_t> resume_step)
    : path_(std::move(path)) {
  if (resume_step) cut_after(path_, *resume_step);
  file_.open(path_, std::ios::binary | (resume_step ? std::ios::app : std::ios::trunc));
  if (!file_) throw_file_error("write the metrics", path_, errno);
}

void MetricsFile::write(const StepMetrics& m) {
  append(to_line({{"kind", "train"},
                  {"step", m.step},
                  {"total_steps", m.total_steps},
                  {"loss", to_json(m.loss)},
                  {"z_loss", to_json(m.z_loss)},
                  {"learning_rate", to_json(m.learning_rate)},
                  {"gradient_norm", to_json(m.gradient_norm)},
                  {"tokens_per_second", to_json(m.tokens_per_second)},
                  {"share_of_peak", to_json(m.share_of_peak)},
                  {"data_wait_share", to_json(m.data_wait_share)},
                  {"seconds_per_step", to_json(m.seconds_per_step)},
                  {"samples", m.samples}}));
}

void MetricsFile::write(const EvaluationMetrics& m) {
  ordered_json line = {{"kind", "evaluation"},
                       {"step", m.step},
                       {"name", m.name},
                       {"loss", to_json(m.loss)},
                       {"tokens", m.tokens}};
  for (const auto& [name, value] : m.scores) line["scores"][name] = to_json(value);
  append(to_line(line));
}

void MetricsFile::write(const EventMetrics& m) {
  ordered_json line = {{"kind", "event"}, {"step", m.step}, {"name", m.name}, {"detail", m.detail}};
  if (!m.processor.empty()) line["processor"] = m.processor;
  if (!m.cpu_level.empty()) line["cpu_level"] = m.cpu_level;
  if (!m.precision.empty()) line["precision"] = m.precision;
  append(to_line(line));
}

void MetricsFile::append(std::string_view line) {
  file_.write(line.data(), static_cast<std::streamsize>(line.size())).flush();
  if (!file_) throw_file_error("write the metrics", path_, errno);
}

MetricsHistory read_metrics(const std::filesystem::path& path) {
  MetricsHistory history;
  visit_lines(path, [&](const json& line, std::int64_t, const std::string& kind) {
    if (kind == "train") history.steps.push_back(step_of(line));
    if (kind == "evaluation") history.evaluations.push_back(evaluation_of(line));
    if (kind == "event") history.events.push_back(event_of(line));
    return true;
  });
  return history;
}

}  // namespace regroup
