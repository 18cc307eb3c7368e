#include "trainer/run/run_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "tests/trainer/checkpoint/shared_directory.h"

namespace regroup {
namespace {

using testing::HasSubstr;

class RunDirectoryTest : public testing::Test {
 protected:
  std::filesystem::path path() const { return directory_ / "run"; }
  void save(const RunDirectory& run, index_t step) const {
    world_.run_on(0, [&] {
      PendingStep pending = run.checkpoints().create(step);
      pending.write_text("config.json", "{}");
      pending.commit({{"step", step}});
    });
  }
  template <class Work>
  std::string refusal(Work&& work) const {
    try {
      work();
    } catch (const UserError& error) {
      EXPECT_TRUE(error.on_every_rank() || world_.size() == 1);
      return error.what();
    }
    return "accepted";
  }

  ProcessGroup world_ = ProcessGroup::world();
  test::SharedDirectory directory_{world_};
  Log log_{world_.rank()};
};

TEST_F(RunDirectoryTest, LookingCreatesNothing) {
  const RunDirectory run(world_, path(), log_);
  EXPECT_EQ(run.newest(), std::nullopt);
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(RunDirectoryTest, OneJobHasIt) {
  RunDirectory first(world_, path(), log_);
  first.take();
  first.take();
  RunDirectory second(world_, path(), log_);
  EXPECT_THAT(refusal([&] { second.take(); }), HasSubstr("held by another job"));
}

TEST_F(RunDirectoryTest, FallsBackOverWhatIsSetAside) {
  RunDirectory run(world_, path(), log_);
  run.take();
  save(run, 10);
  save(run, 20);
  EXPECT_EQ(run.newest(), 20);
  run.set_aside(20, "a file is damaged");
  EXPECT_EQ(run.newest(), 10);
  run.set_aside(10, "a file is damaged");
  // To begin anew would be to lose the run without a word.
  EXPECT_THAT(refusal([&] { run.newest(); }),
              testing::AllOf(HasSubstr("no intact checkpoint is left"), HasSubstr("step-00000010.damaged"),
                             HasSubstr("step-00000020.damaged")));
}

TEST_F(RunDirectoryTest, StartsWithoutANewCheckpointAreCounted) {
  RunDirectory run(world_, path(), log_);
  run.take();
  for (int start = 0; start < 3; ++start) EXPECT_TRUE(run.count_start(100, 3)) << start;
  EXPECT_FALSE(run.count_start(100, 3));
  EXPECT_FALSE(run.count_start(100, 3));
  EXPECT_TRUE(run.count_start(100, 0));  // told not to mind
  EXPECT_TRUE(run.count_start(200, 3));  // progress
  EXPECT_TRUE(run.count_start(100, 1));  // fallen back: another start
  EXPECT_FALSE(run.count_start(100, 1));
  for (const char* nonsense : {"", "[]", "{\"step\": 100, \"starts\": \"many\"}"}) {
    world_.barrier();
    world_.run_on(0, [&] { write_text(path() / "starts.json", nonsense); });
    EXPECT_TRUE(run.count_start(100, 1)) << nonsense;
  }
}

TEST_F(RunDirectoryTest, AStartThatAPersonMendsIsNotCounted) {
  RunDirectory run(world_, path(), log_);
  run.take();
  const auto forget = [&] {
    world_.barrier();
    if (world_.rank() == world_.size() - 1) run.forget_start();
    world_.barrier();
  };
  EXPECT_TRUE(run.count_start(100, 2));
  for (int start = 0; start < 3; ++start) {
    EXPECT_TRUE(run.count_start(100, 2)) << start;
    forget();
  }
  EXPECT_TRUE(run.count_start(100, 2));
  EXPECT_FALSE(run.count_start(100, 2)) << "the first one and the last one";
}

TEST_F(RunDirectoryTest, TheStopFileIsSeenAndRemoved) {
  RunDirectory run(world_, path(), log_);
  run.take();
  EXPECT_FALSE(run.clear_stop_request());
  world_.barrier();
  world_.run_on(0, [&] { write_text(path() / "stop", ""); });
  if (world_.rank() == 0) {
    EXPECT_TRUE(run.stop_requested());
  }
  EXPECT_TRUE(run.clear_stop_request());
  EXPECT_FALSE(std::filesystem::exists(path() / "stop"));
}

}  // namespace
}  // namespace regroup
