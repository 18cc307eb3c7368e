#include "trainer/run/signals.h"

#include <cerrno>
#include <system_error>

#include "kernels/base/error.h"

namespace regroup {
namespace {

extern "C" void ignore_signal(int) {}

struct sigaction action(void (*handler)(int)) {
  struct sigaction result = {};
  result.sa_handler = handler;
  result.sa_flags = SA_RESTART;  // reads and writes under way are not disturbed
  sigemptyset(&result.sa_mask);
  return result;
}

// The first signal of its kind. sigaction() is async-signal-safe (signal-safety(7)).
extern "C" void note_signal(int signal) {
  const int saved = errno;
  // Not SIG_IGN: an ignored signal stays ignored in programs that the process starts.
  const struct sigaction next = action(signal == SIGINT ? SIG_DFL : ignore_signal);
  sigaction(signal, &next, nullptr);
  errno = saved;
}

struct sigaction current_action(int signal) {
  struct sigaction result = {};
  if (sigaction(signal, nullptr, &result) != 0) {
    throw SystemError("sigaction({}): {}", signal, std::generic_category().message(errno));
  }
  return result;
}

}  // namespace

SignalWatch::SignalWatch() : previous_{} {
  const struct sigaction first = action(note_signal);
  for (std::size_t i = 0; i < kSignals.size(); ++i) {
    previous_[i] = current_action(kSignals[i]);
    if (kSignals[i] == SIGINT && previous_[i].sa_handler == SIG_IGN) continue;
    sigaction(kSignals[i], &first, nullptr);
  }
}

SignalWatch::~SignalWatch() {
  for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous_[i], nullptr);
}

std::optional<int> SignalWatch::received() const {
  for (const int signal : kSignals) {
    const auto handler = current_action(signal).sa_handler;
    if (handler == (signal == SIGINT ? SIG_DFL : ignore_signal)) return signal;
  }
  return std::nullopt;
}

}  // namespace regroup
