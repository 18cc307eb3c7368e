#include "trainer/run/signals.h"

#include <csignal>
#include <thread>

#include <gtest/gtest.h>

namespace regroup {
namespace {

// The tests start from the default actions, whatever the test's parent left.
class SignalWatchTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) std::signal(signal, SIG_DFL);
  }
  void TearDown() override { SetUp(); }
};
using SignalWatchDeathTest = SignalWatchTest;

TEST_F(SignalWatchTest, NotesEachSignal) {
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    const SignalWatch watch;
    EXPECT_EQ(watch.received(), std::nullopt);
    std::raise(signal);
    EXPECT_EQ(watch.received(), signal);
    EXPECT_EQ(watch.received(), signal) << "it stays received";
  }
}

TEST_F(SignalWatchTest, RepeatedTerminationSignalsAreSurvived) {
  const SignalWatch watch;
  for (int i = 0; i < 3; ++i) {
    std::raise(SIGUSR1);
    EXPECT_EQ(watch.received(), SIGUSR1);
  }
  for (int i = 0; i < 3; ++i) {
    std::raise(SIGTERM);
    EXPECT_EQ(watch.received(), SIGTERM) << "termination comes before the user signal";
  }
}

TEST_F(SignalWatchTest, SeesSignalsTakenByThreadsStartedBefore) {
  std::jthread worker;
  const SignalWatch watch;
  worker = std::jthread([] { std::raise(SIGTERM); });
  worker.join();
  EXPECT_EQ(watch.received(), SIGTERM);
}

TEST_F(SignalWatchTest, RestoresThePreviousActions) {
  std::signal(SIGTERM, SIG_IGN);
  {
    const SignalWatch watch;
    std::raise(SIGTERM);
    EXPECT_EQ(watch.received(), SIGTERM);
  }
  struct sigaction now = {};
  sigaction(SIGTERM, nullptr, &now);
  EXPECT_EQ(now.sa_handler, SIG_IGN);
  sigaction(SIGUSR1, nullptr, &now);
  EXPECT_EQ(now.sa_handler, SIG_DFL);
  sigaction(SIGINT, nullptr, &now);
  EXPECT_EQ(now.sa_handler, SIG_DFL);
}

TEST_F(SignalWatchTest, AnIgnoredInterruptStaysIgnored) {
  std::signal(SIGINT, SIG_IGN);
  const SignalWatch watch;
  std::raise(SIGINT);
  std::raise(SIGINT);
  EXPECT_EQ(watch.received(), std::nullopt);
}

TEST_F(SignalWatchDeathTest, ASecondInterruptEndsTheProgramEvenIfNobodyLooks) {
  EXPECT_EXIT(
      {
        const SignalWatch watch;
        std::raise(SIGINT);
        std::raise(SIGINT);
      },
      testing::KilledBySignal(SIGINT), "");
}

TEST_F(SignalWatchDeathTest, ATerminationSignalEndsTheProgramAfterTheWatch) {
  EXPECT_EXIT(
      {
        { const SignalWatch watch; }
        std::raise(SIGTERM);
      },
      testing::KilledBySignal(SIGTERM), "");
}

}  // namespace
}  // namespace regroup
