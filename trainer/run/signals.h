// Signals that ask a run to save and stop: SIGTERM and SIGUSR1 from the batch system, SIGINT from the
// keyboard.
#pragma once

#include <array>
#include <csignal>
#include <cstddef>
#include <optional>

namespace regroup {

// While it lives, SIGTERM, SIGUSR1 and SIGINT are noted instead of ending the process; received() tells.
// Further SIGTERM and SIGUSR1 change nothing (a batch system may send them to a process twice), but a second
// SIGINT has its default action, so that Ctrl-C twice ends a run that no longer comes to a step boundary. A
// SIGINT that was ignored before (nohup, a background job) stays ignored. The destructor restores the
// previous actions.
//
// The kernel's table of signal actions is itself the flag: the handler replaces itself, received() looks
// which actions have been replaced. So no variable is shared with a handler, no signal is masked, and it does
// not matter which threads (MPI's, OpenMP's) exist before. At most one at a time.
class SignalWatch {
 public:
  SignalWatch();
  ~SignalWatch();
  SignalWatch(const SignalWatch&) = delete;
  SignalWatch& operator=(const SignalWatch&) = delete;

  // The signal received since construction, if any; of several the first of SIGTERM, SIGINT, SIGUSR1.
  std::optional<int> received() const;

 private:
  static constexpr std::array<int, 3> kSignals = {SIGTERM, SIGINT, SIGUSR1};

  std::array<struct sigaction, kSignals.size()> previous_;
};

}  // namespace regroup
