// Where the watchdogs of a job's ranks tell each other about a halt: files in a folder that all ranks see.
// MPI is of no use there: it is what hangs, and it belongs to the main thread.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "trainer/run/hang_verdict.h"

namespace regroup {

// One rank's view of the folder, which is made when it is first written to. Every member but the constructor
// throws UserError, SystemError or filesystem_error where the file system refuses. Nothing here waits for the
// disk: while a checkpoint is written, that may take longer than a sign of life may.
class HangBoard {
 public:
  HangBoard(std::filesystem::path folder, int rank);

  const std::filesystem::path& folder() const { return folder_; }

  struct Notices {
    std::vector<int> suspicious;  // the ranks that suspect a hang, ascending
    bool judged = false;          // somebody has claimed the verdict
  };
  // What is posted there; the cost of listing a folder that mostly does not exist.
  Notices notices() const;

  // This rank suspects a hang, or does no longer.
  void suspect();
  void withdraw_suspicion();

  void report(const HangReport& report, const RankPlace& place);
  void withdraw_report();
  // Another rank's report; nothing where there is none.
  std::optional<HangReport> report_of(int rank) const;

  // True for exactly one rank: the one that tells the user. The others find `judged`.
  bool claim_verdict(const std::string& text);

 private:
  std::filesystem::path suspicion_file(int rank) const;
  std::filesystem::path report_file(int rank) const;

  std::filesystem::path folder_;
  int rank_;
};

}  // namespace regroup
