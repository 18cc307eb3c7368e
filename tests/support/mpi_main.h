// main() of the tests that run under MPI: every rank runs every test, and a test has one verdict.
#pragma once

namespace regroup::test {

// Runs the tests on every rank of the job; non-zero on all of them where any test failed on any.
//
// Rank 0 prints what GoogleTest prints; of the others only failures are printed, with their rank. At the end
// of each test, and only there, the ranks agree on its verdict: a test that failed on one rank fails on all,
// and one that some ranks skipped and others ran fails. An exception that leaves a test ends the job, because
// the other ranks may be waiting inside a collective operation. `--hang-rank N` lets rank N wait for a
// debugger.
int run_tests_on_ranks(int argc, char** argv);

}  // namespace regroup::test
