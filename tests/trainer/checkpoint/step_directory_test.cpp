#include "trainer/checkpoint/step_directory.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "tests/trainer/checkpoint/shared_directory.h"
#include "tests/trainer/formats/plain_file.h"

namespace regroup {
namespace {

using test::refusal;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

class StepDirectory : public testing::Test {
 protected:
  // A step of two files, one of them of three checksum blocks.
  void save(index_t step, char content = 'x') const {
    world_.run_on(0, [&] {
      PendingStep pending = store_.create(step);
      pending.write_text("model.safetensors", std::string((std::size_t{9} << 20) + 5, content));
      pending.write_text("config.json", "{}");
      pending.write_text("empty", "");
      pending.commit({{"step", step}, {"samples", 128 * step}});
    });
  }
  // Small and fast, for where only names matter.
  void save_small(index_t step) const {
    world_.run_on(0, [&] {
      PendingStep pending = store_.create(step);
      pending.write_text("config.json", "{}");
      pending.commit({{"step", step}});
    });
  }
  // Does `work` on rank 0, after what the other ranks did before and seen by what they do after.
  template <class Work>
  void once(Work&& work) const {
    world_.barrier();
    world_.run_on(0, work);
    world_.barrier();
  }
  std::optional<std::string> damage(index_t step) const { return find_damage(world_, store_.path_of(step)); }
  std::filesystem::path checkpoints() const { return directory_ / "run" / "checkpoints"; }

  ProcessGroup world_ = ProcessGroup::world();
  test::SharedDirectory directory_{world_};
  CheckpointStore store_{world_, directory_ / "run"};
};

TEST_F(StepDirectory, AppearsWholeAtCommit) {
  EXPECT_EQ(store_.latest(), std::nullopt);
  store_.prepare();
  world_.run_on(0, [&] {
    PendingStep pending = store_.create(12000);
    EXPECT_EQ(pending.path(), checkpoints() / "step-00012000.partial");
    EXPECT_EQ(pending.path(), store_.partial_path_of(12000));
    pending.write_text("config.json", "{}\n");
    write_text(pending.path() / "model.safetensors", "abc");  // by others, who tell
    EXPECT_FALSE(std::filesystem::exists(store_.path_of(12000)));
    const std::uint64_t block = checksum(std::as_bytes(std::span("abc", 3)));
    const std::uint64_t file = checksum(std::as_bytes(std::span(&block, 1)));
    pending.commit({{"step", 12000}, {"seed", 7}}, {{"model.safetensors", {.bytes = 3, .checksum = file}}});
  });
  EXPECT_EQ(store_.latest(), 12000);
  EXPECT_EQ(store_.path_of(12000), checkpoints() / "step-00012000");
  EXPECT_FALSE(std::filesystem::exists(checkpoints() / "step-00012000.partial"));
  EXPECT_EQ(read_text(checkpoints() / "latest"), "step-00012000\n");
  const auto state = step_state(world_, store_.path_of(12000));
  EXPECT_EQ(state["step"], 12000);
  EXPECT_EQ(state["seed"], 7);
  EXPECT_EQ(state["files"].size(), 2U);
  EXPECT_EQ(state["files"]["model.safetensors"]["bytes"], 3);
  EXPECT_EQ(damage(12000), std::nullopt);
}

TEST_F(StepDirectory, IsRemovedWithoutCommit) {
  store_.prepare();
  save_small(1);
  world_.run_on(0, [&] { const PendingStep pending = store_.create(2); });
  world_.barrier();
  EXPECT_FALSE(std::filesystem::exists(checkpoints() / "step-00000002.partial"));
  EXPECT_THAT(store_.steps(), ElementsAre(1));
  EXPECT_EQ(damage(1), std::nullopt);
}

TEST_F(StepDirectory, IsNotWrittenTwice) {
  store_.prepare();
  save_small(1);
  EXPECT_THAT(refusal([&] { world_.run_on(0, [&] { store_.create(1); }); }),
              HasSubstr("step-00000001 exists already"));
  EXPECT_EQ(damage(1), std::nullopt);
}

// What a process killed at each stage of a save or a removal leaves behind.
TEST_F(StepDirectory, WhatAKillLeavesIsNeverTakenForAStep) {
  store_.prepare();
  save_small(5);
  once([&] {
    const auto put = [&](const std::string& name) {
      regroup::create_directories(checkpoints() / name);
      std::filesystem::copy(store_.path_of(5), checkpoints() / name,
                            std::filesystem::copy_options::recursive);
    };
    regroup::create_directories(checkpoints() / "step-00000006.partial");   // just begun
    put("step-00000007.partial");                                           // complete but not renamed
    put("step-00000002.deleting");                                          // renamed, not yet removed
    regroup::create_directories(checkpoints() / "step-00000003.deleting");  // half removed
    write_text(checkpoints() / "latest.4711.partial", "step-000");          // `latest` half written
    write_text(checkpoints() / "latest", "step-00000004\n");  // renamed, `latest` not yet replaced
    regroup::create_directories(checkpoints() / "step-9");    // not ours
    regroup::create_directories(checkpoints() / "step-99999999999999999999");  // not ours
    write_text(checkpoints() / "step-00000010", "a file");
  });
  EXPECT_THAT(store_.steps(), ElementsAre(5));
  store_.prepare();
  EXPECT_THAT(store_.steps(), ElementsAre(5));
  EXPECT_EQ(damage(5), std::nullopt);
  for (const char* gone : {"step-00000006.partial", "step-00000007.partial", "step-00000002.deleting",
                           "step-00000003.deleting", "latest.4711.partial"}) {
    EXPECT_FALSE(std::filesystem::exists(checkpoints() / gone)) << gone;
  }
  EXPECT_TRUE(std::filesystem::exists(checkpoints() / "step-9"));
  world_.barrier();
  save_small(6);  // over what was there
  EXPECT_EQ(store_.latest(), 6);
}

TEST_F(StepDirectory, CreateClearsAStalePartial) {
  store_.prepare();
  once([&] {
    regroup::create_directories(checkpoints() / "step-00000001.partial");
    write_text(checkpoints() / "step-00000001.partial" / "stale", "stale");
  });
  save_small(1);
  EXPECT_FALSE(step_state(world_, store_.path_of(1))["files"].contains("stale"));
}

// The checksums do not depend on the number of ranks: against the definition, computed on one.
TEST_F(StepDirectory, ChecksumsAreThoseOfTheBlocks) {
  std::string content((std::size_t{9} << 20) + 5, '\0');
  for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 2654435761U >> 13);
  once([&] {
    write_text(directory_ / "large", content);
    write_text(directory_ / "empty", "");
    write_text(directory_ / "small", "abc");
  });
  const auto reference = [](const std::string& text) {
    std::vector<std::uint64_t> blocks;
    constexpr std::size_t kBlock = std::size_t{4} << 20;
    for (std::size_t at = 0; at < text.size(); at += kBlock) {
      const std::string_view block = std::string_view(text).substr(at, kBlock);
      blocks.push_back(checksum(std::as_bytes(std::span(block.data(), block.size()))));
    }
    return checksum(std::as_bytes(std::span(blocks)));
  };
  EXPECT_THAT(tree_checksums(world_, {directory_ / "large", directory_ / "empty", directory_ / "small"}),
              ElementsAre(reference(content), reference(""), reference("abc")));
  EXPECT_THAT(tree_checksums(world_, {}), IsEmpty());
  EXPECT_THAT(refusal([&] { tree_checksums(world_, {directory_ / "absent"}); }), HasSubstr("absent"));
}

TEST_F(StepDirectory, VerifyNamesTheDamagedFile) {
  store_.prepare();
  save(3);
  EXPECT_EQ(damage(3), std::nullopt);
  for (const std::string name : {"model.safetensors", "config.json", "trainer.json"}) {
    const auto path = store_.path_of(3) / name;
    const std::string intact = read_text(path);
    const auto expect_found = [&](const std::string& damage) {
      EXPECT_THAT(refusal([&] { verify_step(world_, store_.path_of(3)); }),
                  AllOf(HasSubstr(path.string()), HasSubstr("an earlier checkpoint"), Not(HasSubstr("\n"))))
          << name << ": " << damage;
      once([&] { write_text(path, intact); });
    };
    for (const std::size_t at : {std::size_t{0}, intact.size() / 2, intact.size() - 1}) {
      for (const int bit : {0, 5}) {
        once([&] {
          std::string flipped = intact;
          flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
          write_text(path, flipped);
        });
        expect_found(fmt::format("bit {} of byte {}", bit, at));
      }
    }
    once([&] { write_text(path, intact.substr(0, intact.size() - 1)); });
    expect_found("truncated");
    once([&] { write_text(path, intact + "x"); });
    expect_found("longer");
    once([&] { write_text(path, ""); });
    expect_found("empty");
    once([&] { std::filesystem::remove(path); });
    EXPECT_THAT(refusal([&] { verify_step(world_, store_.path_of(3)); }), HasSubstr(path.string())) << name;
    once([&] { write_text(path, intact); });
  }
  EXPECT_EQ(damage(3), std::nullopt);
}

// Every byte of trainer.json, which has no other file to vouch for it.
TEST_F(StepDirectory, EveryByteOfTheStateCounts) {
  store_.prepare();
  save_small(1);
  const auto path = store_.path_of(1) / "trainer.json";
  const std::string intact = read_text(path);
  for (std::size_t at = 0; at < intact.size(); ++at) {
    once([&] {
      std::string flipped = intact;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << (at % 8)));
      std::ofstream(path, std::ios::binary | std::ios::trunc) << flipped;
    });
    EXPECT_THAT(refusal([&] { step_state(world_, store_.path_of(1)); }), HasSubstr("trainer.json is damaged"))
        << "byte " << at;
  }
}

TEST_F(StepDirectory, StatesOfOtherMakeAreRefused) {
  store_.prepare();
  save_small(1);
  const auto path = store_.path_of(1) / "trainer.json";
  for (const std::string text :
       {"", "{", "[]", "{}", "null", R"({"files":{}})", R"({"files":[],"checksum":""})",
        R"({"files":{"../x":{"bytes":1,"checksum":"a"}},"checksum":"0"})"}) {
    once([&] { write_text(path, text); });
    EXPECT_THAT(refusal([&] { step_state(world_, store_.path_of(1)); }), HasSubstr("trainer.json is damaged"))
        << text;
  }
}

TEST_F(StepDirectory, PruneKeepsTheNewestAndTheMultiples) {
  store_.prepare();
  for (index_t step = 100; step <= 900; step += 100) save_small(step);
  once([&] { store_.prune(3, 0); });
  EXPECT_THAT(store_.steps(), ElementsAre(700, 800, 900));
  for (index_t step = 1000; step <= 1400; step += 100) save_small(step);
  once([&] { store_.prune(2, 400); });
  EXPECT_THAT(store_.steps(), ElementsAre(800, 1200, 1300, 1400));
  once([&] { store_.prune(0, 0); });  // never the newest
  EXPECT_THAT(store_.steps(), ElementsAre(1400));
  EXPECT_EQ(damage(1400), std::nullopt);
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(checkpoints())) {
    names.push_back(entry.path().filename().string());
  }
  EXPECT_THAT(names, testing::UnorderedElementsAre("latest", "step-00001400"));
}

TEST_F(StepDirectory, ADamagedStepIsSetAsideForAPerson) {
  store_.prepare();
  save_small(1);
  save_small(2);
  EXPECT_THAT(store_.damaged(), IsEmpty());
  once([&] { write_text(store_.path_of(2) / "config.json", "[]"); });
  EXPECT_THAT(damage(2).value_or("none"), HasSubstr("config.json is damaged"));
  store_.set_aside(2);
  EXPECT_EQ(store_.latest(), 1);
  EXPECT_THAT(store_.damaged(), ElementsAre("step-00000002.damaged"));
  store_.prepare();  // a later job leaves it alone, and may come to the same step
  save_small(2);
  EXPECT_EQ(damage(2), std::nullopt);
  EXPECT_EQ(read_text(checkpoints() / "step-00000002.damaged" / "config.json"), "[]");
  world_.barrier();
  store_.set_aside(2);
  EXPECT_EQ(read_text(checkpoints() / "step-00000002.damaged" / "config.json"), "{}");
}

// A file that is there but cannot be read is no damage: the next start may be able to.
TEST_F(StepDirectory, WhatCannotBeReadIsNotDamaged) {
  store_.prepare();
  save_small(1);
  once([&] {
    std::filesystem::remove(store_.path_of(1) / "trainer.json");
    regroup::create_directories(store_.path_of(1) / "trainer.json");
  });
  EXPECT_THAT(refusal([&] { damage(1); }), HasSubstr("cannot read"));
}

TEST_F(StepDirectory, SaysOnEveryRankThatADirectoryCannotBeMade) {
  once([&] {
    regroup::create_directories(directory_ / "run");
    write_text(checkpoints(), "a file in the way");
  });
  EXPECT_THAT(refusal([&] { store_.prepare(); }), HasSubstr(checkpoints().string()));
}

}  // namespace
}  // namespace regroup
