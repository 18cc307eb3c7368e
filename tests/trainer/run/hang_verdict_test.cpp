// Whom the verdict on a hang names, case by case.
#include "trainer/run/hang_verdict.h"

#include <gtest/gtest.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

using Reports = std::vector<std::optional<HangReport>>;

// Two ranks on each of the hosts node0, node1, ...; process 100 + rank.
std::vector<RankPlace> places(std::size_t ranks) {
  std::vector<RankPlace> result;
  for (std::size_t r = 0; r < ranks; ++r) {
    result.push_back({.host = fmt::format("node{}", r / 2), .pid = 100 + static_cast<std::int64_t>(r)});
  }
  return result;
}

HangReport waiting(const std::string& in = "dp all_reduce", std::uint64_t waits = 40) {
  return {.number = 1,
          .still = 10,
          .state = {
              .beats = 99, .waits = waits, .step = 12, .operation = "forward and backward", .waits_in = in}};
}
HangReport busy(const std::string& operation) {
  return {.number = 1, .still = 10, .state = {.beats = 99, .waits = 39, .step = 12, .operation = operation}};
}

std::string verdict(const Reports& reports) { return hang_verdict(places(reports.size()), reports, 10); }

constexpr const char* kEnd =
    ". No progress in 10 s (--hang-timeout): the job is ended, and the same command resumes from its last "
    "checkpoint";

TEST(HangVerdict, OfARankThatGivesNoSignOfLife) {
  EXPECT_EQ(verdict({waiting(), waiting(), std::nullopt, waiting()}),
            std::string("the job hangs: rank 2 on node1 (process 102) gives no sign of life: the process is "
                        "stopped, or the node is gone; rank 0 on node0 (process 100), at step 12 in dp "
                        "all_reduce of 'forward and backward', waits") +
                kEnd);
}

TEST(HangVerdict, OfANodeThatIsGone) {
  const std::string text = verdict({waiting(), waiting(), std::nullopt, std::nullopt});
  EXPECT_NE(text.find("rank 2 on node1 (process 102) and rank 3 on node1 (process 103) give no sign"),
            std::string::npos)
      << text;
}

TEST(HangVerdict, ARankWithoutASignIsNamedBeforeOneThatIsBusy) {
  const std::string text = verdict({std::nullopt, busy("reading a batch"), waiting(), waiting()});
  EXPECT_NE(text.find("hangs: rank 0 on node0 (process 100) gives no"), std::string::npos) << text;
  EXPECT_EQ(text.find("rank 1"), std::string::npos) << text;
}

TEST(HangVerdict, ARankWithoutASignIsAHangThoughAnotherBeats) {
  HangReport beating = busy("saving");
  beating.still = 0;
  EXPECT_NE(verdict({beating, std::nullopt, waiting(), waiting()}), "");
}

TEST(HangVerdict, OfOneThatWaitsForNobody) {
  EXPECT_EQ(verdict({waiting(), waiting(), waiting(), busy("reading a batch")}),
            std::string("the job hangs: rank 3 on node1 (process 103), at step 12 in 'reading a batch', has "
                        "not come any further; rank 0 on node0 (process 100), at step 12 in dp all_reduce of "
                        "'forward and backward', waits") +
                kEnd);
}

TEST(HangVerdict, OfARunOfOneRank) {
  EXPECT_EQ(verdict({busy("saving")}),
            std::string("the job hangs: rank 0 on node0 (process 100), at step 12 in 'saving', has not come "
                        "any further") +
                kEnd);
}

TEST(HangVerdict, OfOneThatIsACollectiveBehind) {
  EXPECT_EQ(
      verdict({waiting(), waiting("tp broadcast", 38), waiting(), waiting()}),
      std::string("the job hangs: rank 1 on node0 (process 101), at step 12 in tp broadcast of "
                  "'forward and backward', is behind the others, in collective operation 38 of the step; "
                  "rank 0 on "
                  "node0 (process 100), at step 12 in dp all_reduce of 'forward and backward', waits "
                  "in number 40") +
          kEnd);
}

TEST(HangVerdict, OfOneThatIsAStepBehindThoughItWaitedMoreOften) {
  HangReport behind = waiting("all_reduce", 90);
  behind.state.step = 11;
  const std::string text = verdict({waiting("dp all_reduce", 3), behind, waiting("dp all_reduce", 3)});
  EXPECT_NE(
      text.find("hangs: rank 1 on node0 (process 101), at step 11 in all_reduce of 'forward and backward', "
                "is behind the others, in collective operation 90 of the step; rank 0 on node0"),
      std::string::npos)
      << text;
}

TEST(HangVerdict, OfALinkThatIsDown) {
  EXPECT_EQ(
      verdict({waiting(), waiting()}),
      std::string("the job hangs: every rank waits for the others; rank 0 on node0 (process 100), at step 12 "
                  "in dp all_reduce of 'forward and backward', too: a link, a GPU or the file system may be "
                  "down") +
          kEnd);
}

TEST(HangVerdict, NamesFourAndCountsTheRest) {
  Reports reports(9, std::nullopt);
  reports.push_back(waiting());
  const std::string text = verdict(reports);
  EXPECT_NE(text.find("rank 3 on node1 (process 103) and 5 more give no sign of life"), std::string::npos)
      << text;
}

TEST(HangVerdict, NoneWhileOneOfThemMakesProgress) {
  HangReport beating = busy("reading the checkpoint");
  beating.still = 9.5;
  EXPECT_EQ(verdict({waiting(), waiting(), beating, waiting()}), "");
}

TEST(HangReport, TravelsAsText) {
  HangReport report = waiting();
  report.number = 7;
  report.still = 1.5;
  const HangReport read = hang_report_from_json(to_json(report, {.host = "node0", .pid = 3}), "a file");
  EXPECT_EQ(read.number, 7U);
  EXPECT_EQ(read.still, 1.5);
  EXPECT_EQ(read.state.step, 12);
  EXPECT_EQ(read.state.waits, 40U);
  EXPECT_EQ(read.state.operation, "forward and backward");
  EXPECT_EQ(read.state.waits_in, "dp all_reduce");
  EXPECT_THROW(hang_report_from_json("{\"number\": 1", "a file"), UserError);
  EXPECT_THROW(hang_report_from_json("{}", "a file"), UserError);
}

}  // namespace
}  // namespace regroup
