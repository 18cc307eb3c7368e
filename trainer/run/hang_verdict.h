// Who holds up a job that has come to a halt: a function of what each rank says of itself.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/heartbeat.h"

namespace regroup {

// Where a rank runs.
struct RankPlace {
  std::string host;
  std::int64_t pid = 0;
};

// What a rank's watchdog says of its rank.
struct HangReport {
  std::uint64_t number = 0;  // of this rank's reports: a process that is stopped gives no new one
  double still = 0;          // seconds without a beat
  Heartbeat::State state;
};

// For the file of a rank, with the place for whoever reads it.
std::string to_json(const HangReport& report, const RankPlace& place);
// UserError where `text`, of the file `where`, is no report.
HangReport hang_report_from_json(const std::string& text, const std::string& where);

// One line that names the culprits, with host, process, step and operation, and says what to do; "" where
// every rank has a report and one of them made progress within `timeout` seconds. The culprits are the ranks
// without a report; else those that wait for nobody; else those that have come less far than others, by step
// and collective operation; else it is nobody of them. `reports` and `places` are by rank.
std::string hang_verdict(const std::vector<RankPlace>& places,
                         const std::vector<std::optional<HangReport>>& reports, double timeout);

}  // namespace regroup
