#include "trainer/run/hang_verdict.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

using Ranks = std::vector<std::size_t>;

// The ranks that `is` holds for.
template <class Is>
Ranks ranks_where(std::size_t count, Is&& is) {
  Ranks result;
  for (std::size_t rank = 0; rank < count; ++rank) {
    if (is(rank)) result.push_back(rank);
  }
  return result;
}

class Judgement {
 public:
  Judgement(const std::vector<RankPlace>& places, const std::vector<std::optional<HangReport>>& reports)
      : places_(places), reports_(reports) {}

  std::string text() const {
    const Ranks silent = where([](const auto& report) { return !report.has_value(); });
    if (!silent.empty()) return of_silent(silent);
    const Ranks busy = where([](const auto& report) { return report->state.waits_in.empty(); });
    if (!busy.empty()) return of_busy(busy);
    const auto place = [this](std::size_t rank) {  // in the program
      return std::pair(reports_[rank]->state.step, reports_[rank]->state.waits);
    };
    const Ranks all = where([](const auto&) { return true; });
    const auto earlier = [&](std::size_t a, std::size_t b) { return place(a) < place(b); };
    const auto least = std::min_element(all.begin(), all.end(), earlier);
    const auto most = std::max_element(all.begin(), all.end(), earlier);
    if (place(*least) == place(*most)) {
      return fmt::format(
          "every rank waits for the others; {} too: a link, a GPU or the file system may be down",
          description(0));
    }
    Ranks behind = all;
    std::erase_if(behind, [&](std::size_t rank) { return place(rank) != place(*least); });
    return fmt::format("{} behind the others, in collective operation {} of the step; {} waits in number {}",
                       list(behind, "is", "are", true), place(*least).second, description(*most),
                       place(*most).second);
  }

 private:
  template <class Is>
  Ranks where(Is&& is) const {
    return ranks_where(reports_.size(), [&](std::size_t rank) { return is(reports_[rank]); });
  }

  std::string of_silent(const Ranks& silent) const {
    return fmt::format("{} no sign of life: the process is stopped, or the node is gone",
                       list(silent, "gives", "give", false)) +
           witness();
  }

  std::string of_busy(const Ranks& busy) const {
    return list(busy, "has", "have", true) + " not come any further" + witness();
  }

  // One of those that wait, if any does.
  std::string witness() const {
    const Ranks waiting = where([](const auto& report) { return report && !report->state.waits_in.empty(); });
    return waiting.empty() ? "" : fmt::format("; {} waits", description(waiting.front()));
  }

  std::string name(std::size_t rank) const {
    return fmt::format("rank {} on {} (process {})", rank, places_[rank].host, places_[rank].pid);
  }

  // "rank 0 on node1 (process 7), at step 12 in dp all_reduce of 'forward and backward',"
  std::string description(std::size_t rank) const {
    const Heartbeat::State& state = reports_[rank]->state;
    const std::string wait = state.waits_in.empty() ? "" : state.waits_in + " of ";
    return fmt::format("{}, at step {} in {}'{}',", name(rank), state.step, wait, state.operation);
  }

  // "rank 3 on node2 (process 8) and rank 4 on ... " and the verb; each described where `described`.
  std::string list(const Ranks& ranks, const char* singular, const char* plural, bool described) const {
    constexpr std::size_t kMost = 4;
    std::string text;
    for (std::size_t i = 0; i < std::min(ranks.size(), kMost); ++i) {
      if (i > 0) text += described ? " and " : i + 1 == ranks.size() ? " and " : ", ";
      text += described ? description(ranks[i]) : name(ranks[i]);
    }
    if (ranks.size() > kMost) text += fmt::format(" and {} more", ranks.size() - kMost);
    return fmt::format("{} {}", text, ranks.size() == 1 ? singular : plural);
  }

  const std::vector<RankPlace>& places_;
  const std::vector<std::optional<HangReport>>& reports_;
};

}  // namespace

std::string to_json(const HangReport& report, const RankPlace& place) {
  return json_text(nlohmann::json{{"host", place.host},
                                  {"pid", place.pid},
                                  {"number", report.number},
                                  {"still", report.still},
                                  {"step", report.state.step},
                                  {"operation", report.state.operation},
                                  {"waits_in", report.state.waits_in},
                                  {"waits", report.state.waits}},
                   2);
}

HangReport hang_report_from_json(const std::string& text, const std::string& where) {
  try {
    const nlohmann::json json = parse_json(text);
    HangReport report;
    json.at("number").get_to(report.number);
    json.at("still").get_to(report.still);
    json.at("step").get_to(report.state.step);
    json.at("operation").get_to(report.state.operation);
    json.at("waits_in").get_to(report.state.waits_in);
    json.at("waits").get_to(report.state.waits);
    return report;
  } catch (const nlohmann::json::exception& error) {
    throw UserError("{} is no report of a watchdog: {}", where, error.what());
  }
}

std::string hang_verdict(const std::vector<RankPlace>& places,
                         const std::vector<std::optional<HangReport>>& reports, double timeout) {
  check(!places.empty() && places.size() == reports.size(), "{} reports of {} ranks", reports.size(),
        places.size());
  const bool all_speak =
      std::all_of(reports.begin(), reports.end(), [](const auto& report) { return report.has_value(); });
  const bool progress = std::any_of(reports.begin(), reports.end(), [timeout](const auto& report) {
    return report && report->still < timeout;
  });
  if (all_speak && progress) return "";
  return fmt::format(
      "the job hangs: {}. No progress in {:g} s (--hang-timeout): the job is ended, and the same command "
      "resumes from its last checkpoint",
      Judgement(places, reports).text(), timeout);
}

}  // namespace regroup
