#include "trainer/options.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "trainer/model/config.h"

namespace regroup {
namespace {

namespace fs = std::filesystem;

// The message of the UserError that `action` throws; "" where it throws none.
template <class Action>
std::string complaint(Action&& action) {
  try {
    action();
  } catch (const UserError& error) {
    return error.what();
  }
  return "";
}

std::string complaint_about(const std::vector<std::string>& arguments) {
  return complaint([&] { parse_options(arguments); });
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string resolved(const Options& options, const std::string& name) {
  const auto found = std::find_if(options.resolved.begin(), options.resolved.end(),
                                  [&](const auto& entry) { return entry.first == name; });
  return found == options.resolved.end() ? "absent" : found->second;
}

// In an empty working directory of its own.
class OptionsTest : public testing::Test {
 public:
  OptionsTest(const OptionsTest&) = delete;
  OptionsTest& operator=(const OptionsTest&) = delete;

 protected:
  OptionsTest()
      : before_(fs::current_path()),
        folder_(fs::path(testing::TempDir()) /
                testing::UnitTest::GetInstance()->current_test_info()->name()) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    fs::current_path(folder_);
  }
  ~OptionsTest() override {
    std::error_code ignored;
    fs::current_path(before_, ignored);
    fs::remove_all(folder_, ignored);
  }

  // The folders that the embedded configuration needs.
  static void make_quickstart_folders() {
    fs::create_directories("quickstart-data/corpus");
    fs::create_directories("quickstart-data/runs/parent");
  }

  std::string config(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
    return (folder_ / name).string();
  }

 private:
  fs::path before_, folder_;
};

// ---- parse_config
// --------------------------------------------------------------------------------------------------

TEST(ParseConfig, ReadsPairsSectionsAndComments) {
  const auto lines = parse_config(
      "# a comment\n\n model =  base # another\r\n[uptrain]\nkv-groups=2\n[ pretrain ]\nsteps = 10", "x.cfg");
  ASSERT_EQ(lines.size(), 3U);
  EXPECT_EQ(lines[0].section, "");
  EXPECT_EQ(lines[0].key, "model");
  EXPECT_EQ(lines[0].value, "base");
  EXPECT_EQ(lines[0].line, 3);
  EXPECT_EQ(lines[1].section, "uptrain");
  EXPECT_EQ(lines[1].key, "kv-groups");
  EXPECT_EQ(lines[1].value, "2");
  EXPECT_EQ(lines[1].line, 5);
  EXPECT_EQ(lines[2].section, "pretrain");
  EXPECT_EQ(lines[2].line, 7);
}

TEST(ParseConfig, KeepsEqualsSignsAndEmptyValues) {
  const auto lines = parse_config("run = a=b\ncorpus =\n", "x.cfg");
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[0].value, "a=b");
  EXPECT_EQ(lines[1].value, "");
}

TEST(ParseConfig, AnEmptyFileHasNoLines) { EXPECT_TRUE(parse_config("", "x.cfg").empty()); }

TEST(ParseConfig, NamesTheLineOfWhatItRefuses) {
  const auto of = [](const std::string& text) { return complaint([&] { parse_config(text, "my.cfg"); }); };
  EXPECT_TRUE(contains(of("model = tiny\nsteps 10\n"), "my.cfg:2")) << of("model = tiny\nsteps 10\n");
  EXPECT_TRUE(contains(of("= 10\n"), "my.cfg:1"));
  EXPECT_TRUE(contains(of("\n\n[uptrian]\n"), "my.cfg:3"));
  EXPECT_TRUE(contains(of("[uptrian]\n"), "uptrain")) << "the nearest section is named";
  EXPECT_TRUE(contains(of("[uptrain\n"), "my.cfg:1"));
  EXPECT_TRUE(contains(of("[]\n"), "my.cfg:1"));
  EXPECT_TRUE(contains(of(std::string("a\0b = 1\n", 8)), "not a text file"));
}

// ---- The command line
// ----------------------------------------------------------------------------------------------

TEST_F(OptionsTest, OneModeIsNeeded) {
  EXPECT_TRUE(contains(complaint_about({}), "no mode is given"));
  EXPECT_TRUE(contains(complaint_about({"--pretrain", "--uptrain"}), "--pretrain and --uptrain"));
  EXPECT_EQ(parse_options({"--help"}).mode, Mode::kHelp);
  EXPECT_EQ(parse_options({"--version"}).mode, Mode::kVersion);
}

TEST_F(OptionsTest, UnknownOptionsNameTheNearest) {
  const std::string message = complaint_about({"--uptrain", "--kv-group", "2"});
  EXPECT_TRUE(contains(message, "'kv-group'")) << message;
  EXPECT_TRUE(contains(message, "kv-groups")) << message;
  EXPECT_TRUE(contains(complaint_about({"--uptrain", "--batchsize=4"}), "batch-size"));
  EXPECT_TRUE(contains(complaint_about({"--uptran"}), "uptrain"));
}

TEST_F(OptionsTest, ComplaintsAreOneLine) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"--uptrain", "--steps"},
                                             {"--uptrain", "stray"},
                                             {"--uptrain", "--steps", "many"},
                                             {"--pretain"}}) {
    const std::string message = complaint_about(arguments);
    EXPECT_FALSE(message.empty()) << arguments.back();
    EXPECT_FALSE(contains(message, "\n")) << message;
  }
}

TEST_F(OptionsTest, MalformedValuesNameTheOption) {
  for (const auto& [option, value] :
       std::vector<std::pair<std::string, std::string>>{{"steps", "many"},
                                                        {"steps", "1.5"},
                                                        {"steps", ""},
                                                        {"steps", "1e3"},
                                                        {"threads", "99999999999"},
                                                        {"alpha", "5%"},
                                                        {"recompute", "maybe"},
                                                        {"heads", "six"},
                                                        {"precision", "fp16"},
                                                        {"optimizer", "adam"},
                                                        {"batch-size", "0"},
                                                        {"micro-batch", "-1"},
                                                        {"alpha", "0"},
                                                        {"alpha", "nan"},
                                                        {"until-recovered", "most"},
                                                        {"until-recovered", "-0.1"},
                                                        {"until-recovered", "1.01"},
                                                        {"until-recovered", "nan"},
                                                        {"document", "page"}}) {
    const std::string message = complaint_about({"--pretrain", "--" + option + "=" + value});
    EXPECT_TRUE(contains(message, option)) << option << " = " << value << ": " << message;
  }
  const std::string near = complaint_about({"--pretrain", "--optimizer", "adafactr"});
  EXPECT_TRUE(contains(near, "adafactor")) << near;
}

TEST_F(OptionsTest, UntilRecoveredIsForUptrainingsThatEvaluate) {
  make_quickstart_folders();
  EXPECT_EQ(parse_options({"--uptrain"}).until_recovered, 0);
  EXPECT_EQ(parse_options({"--uptrain", "--until-recovered", "0"}).until_recovered, 0);
  EXPECT_EQ(parse_options({"--uptrain", "--until-recovered", "1"}).until_recovered, 1);
  EXPECT_TRUE(contains(complaint_about({"--pretrain", "--until-recovered", "0.99"}), "[uptrain]"));
  EXPECT_TRUE(contains(complaint_about({"--uptrain", "--until-recovered", "0.99", "--evaluate-every", "0"}),
                       "--evaluate-every"));
  EXPECT_EQ(parse_options({"--uptrain", "--evaluate-every", "0"}).evaluate_every, 0);
  EXPECT_EQ(resolved(parse_options({"--pretrain"}), "until-recovered"), "absent");
}

TEST_F(OptionsTest, SwitchesTakeAValueOrNone) {
  make_quickstart_folders();
  EXPECT_FALSE(parse_options({"--uptrain"}).recompute);
  EXPECT_TRUE(parse_options({"--uptrain", "--recompute"}).recompute);
  EXPECT_TRUE(parse_options({"--uptrain", "--recompute=on"}).recompute);
  EXPECT_FALSE(parse_options({"--uptrain", "--recompute=off"}).recompute);
}

TEST_F(OptionsTest, ListsTakeSeveralValues) {
  const Options options = parse_options({"--report", "--runs", "a", "b", "--runs", "c"});
  EXPECT_EQ(options.runs, (std::vector<fs::path>{"a", "b", "c"}));
}

TEST_F(OptionsTest, EachModeSaysWhatItLacks) {
  EXPECT_TRUE(contains(complaint_about({"--train-tokenizer"}), "--input"));
  EXPECT_TRUE(contains(complaint_about({"--train-tokenizer", "--input", "t"}), "--output"));
  EXPECT_TRUE(contains(complaint_about({"--prepare-data", "--input", "t"}), "--tokenizer"));
  EXPECT_TRUE(contains(complaint_about({"--pretrain", "--model", "tiny"}), "--run"));
  EXPECT_TRUE(contains(complaint_about({"--uptrain", "--model", "tiny", "--run", "r"}), "--corpus"));
  EXPECT_TRUE(contains(complaint_about({"--uptrain", "--corpus", "c", "--run", "r"}), "--init-from"));
  EXPECT_TRUE(contains(complaint_about({"--evaluate"}), "--checkpoint"));
  EXPECT_TRUE(contains(complaint_about({"--report"}), "--runs"));
}

// ---- Configuration files
// -------------------------------------------------------------------------------------------

TEST_F(OptionsTest, TheEmbeddedDefaultRunsPretrainAndUptrain) {
  make_quickstart_folders();
  const Options pretrain = parse_options({"--pretrain"});
  EXPECT_EQ(pretrain.run, "quickstart-data/runs/parent");
  EXPECT_FALSE(pretrain.kv_groups.has_value()) << "a line of [uptrain] reached --pretrain";
  EXPECT_GT(pretrain.steps, 0);
  const Options uptrain = parse_options({"--uptrain", "--kv-groups", "1"});
  EXPECT_EQ(uptrain.init_from, pretrain.run);
  EXPECT_EQ(uptrain.corpus, pretrain.corpus);
  EXPECT_EQ(uptrain.kv_groups, 1) << "the command line wins over the embedded default";
  EXPECT_NE(uptrain.run, pretrain.run);
}

TEST_F(OptionsTest, TheEmbeddedDefaultSaysWhatMakesItsFolders) {
  const std::string no_corpus = complaint_about({"--uptrain"});
  EXPECT_TRUE(contains(no_corpus, "quickstart-data/corpus") && contains(no_corpus, "./quickstart"))
      << no_corpus;
  fs::create_directories("quickstart-data/corpus");
  EXPECT_EQ(complaint_about({"--pretrain"}), "");
  const std::string no_parent = complaint_about({"--uptrain"});
  EXPECT_TRUE(contains(no_parent, "runs/parent") && contains(no_parent, "./quickstart")) << no_parent;
}

TEST_F(OptionsTest, TheEmbeddedDefaultStandsBackWhereARunIsDescribed) {
  const std::string file = config("own.cfg", "seed = 3\n");
  for (const std::vector<std::string>& own :
       std::vector<std::vector<std::string>>{{"--config", file}, {"--model", "base"}, {"--corpus", "c"}}) {
    std::vector<std::string> arguments = {"--pretrain"};
    arguments.insert(arguments.end(), own.begin(), own.end());
    EXPECT_TRUE(contains(complaint_about(arguments), "--run")) << own.front();
  }
}

TEST_F(OptionsTest, ModeThenLaterFileThenCommandLineWins) {
  const std::string first =
      config("first.cfg",
             "run = r\ncorpus = c\ninit-from = p\nbatch-size = 1\nworkers = 1\nseed = 1\n"
             "[uptrain]\nbatch-size = 2\nworkers = 2\nseed = 2\n[pretrain]\nsteps = 9\n");
  const std::string second = config("second.cfg", "workers = 3\nseed = 3\n");
  const Options options = parse_options({"--config", first, "--uptrain", "--config", second, "--seed", "4"});
  EXPECT_EQ(options.batch_size, 2) << "a section wins over what stands before it";
  EXPECT_EQ(options.workers, 3) << "a later file wins over a section of an earlier one";
  EXPECT_EQ(options.seed, 4U) << "the command line wins over all";
  EXPECT_EQ(options.steps, 0) << "another mode's section counts for nothing";
  const Options pretrain = parse_options({"--pretrain", "--config", first});
  EXPECT_EQ(pretrain.steps, 9);
  EXPECT_EQ(pretrain.batch_size, 1);
}

TEST_F(OptionsTest, TheLaterOfTwoEqualLinesWins) {
  const std::string file = config("twice.cfg", "run = r\ncorpus = c\nsteps = 1\nsteps = 2\n");
  EXPECT_EQ(parse_options({"--pretrain", "--config", file}).steps, 2);
}

TEST_F(OptionsTest, ErrorsOfAFileNameFileAndLine) {
  const auto of = [this](const std::string& text) {
    const std::string file = config("bad.cfg", text);
    const std::string message = complaint_about({"--pretrain", "--config", file});
    EXPECT_TRUE(contains(message, file + ":")) << message;
    EXPECT_FALSE(contains(message, "\n")) << message;
    return message;
  };
  const std::string typo = of("run = r\n\nbatch-sise = 3\n");
  EXPECT_TRUE(contains(typo, "bad.cfg:3")) << typo;
  EXPECT_TRUE(contains(typo, "batch-size")) << typo;
  EXPECT_TRUE(contains(of("run = r\nsteps = ten\n"), "bad.cfg:2"));
  EXPECT_TRUE(contains(of("run = r\nsteps =\n"), "bad.cfg:2"));
  EXPECT_TRUE(contains(of("config = other.cfg\n"), "bad.cfg:1"));
  EXPECT_TRUE(contains(of("pretrain = on\n"), "command line"));
  EXPECT_TRUE(contains(of("[uptrain]\nstep = 1\n"), "bad.cfg:2")) << "sections of other modes are read too";
  EXPECT_TRUE(contains(of("run r\n"), "bad.cfg:1"));
}

TEST_F(OptionsTest, AMissingFileIsNamed) {
  EXPECT_TRUE(contains(complaint_about({"--pretrain", "--config", "nowhere.cfg"}), "nowhere.cfg"));
}

TEST_F(OptionsTest, ResolvedSaysTheRunAgain) {
  make_quickstart_folders();
  const Options options = parse_options({"--uptrain", "--kv-groups", "1", "--recompute", "--alpha", "0.1"});
  EXPECT_EQ(resolved(options, "kv-groups"), "1");
  EXPECT_EQ(resolved(options, "recompute"), "on");
  EXPECT_EQ(resolved(options, "alpha"), "0.1");
  EXPECT_EQ(resolved(options, "uptrain"), "absent") << "the mode is not an option of the run";
  std::string text;
  for (const auto& [name, value] : options.resolved) text += name + " = " + value + "\n";
  EXPECT_EQ(parse_options({"--uptrain", "--config", config("again.cfg", text)}).resolved, options.resolved);
}

// ---- Committed configurations
// --------------------------------------------------------------------------------------

const fs::path kConfigs = REGROUP_CONFIGS;

TEST(CommittedConfigs, EachSizeNamesItself) {
  for (const std::string& size : model_sizes()) {
    const std::string file = (kConfigs / "models" / (size + ".cfg")).string();
    const Options options =
        parse_options({"--pretrain", "--config", file, "--run", "r", "--corpus", "c", "--steps", "1"});
    EXPECT_EQ(options.model, size);
    // The comment's number of parameters is the model's.
    std::ifstream stream(file);
    const std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    std::string count = std::to_string(parameter_count(t5_1_1(size)));
    for (std::ptrdiff_t at = std::ssize(count) - 3; at > 0; at -= 3)
      count.insert(static_cast<std::size_t>(at), 1, ',');
    EXPECT_TRUE(contains(text, count + " parameters")) << size << " has " << count;
  }
}

TEST(CommittedConfigs, AllOfThemParse) {
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(kConfigs)) {
    if (entry.path().extension() != ".cfg") continue;
    ++files;
    for (const char* mode : {"--pretrain", "--uptrain"}) {
      EXPECT_EQ(complaint_about({mode, "--config", entry.path().string(), "--run", "r", "--corpus", "c",
                                 "--steps", "1", "--init-from", "p"}),
                "")
          << entry.path();
    }
  }
  EXPECT_GE(files, 9);
}

TEST(CommittedConfigs, UptrainingIsThePapers) {
  const Options options = parse_options(
      {"--uptrain", "--config", (kConfigs / "recipes" / "uptrain.cfg").string(), "--config",
       (kConfigs / "models" / "xxl.cfg").string(), "--run", "r", "--corpus", "c", "--init-from", "p"});
  EXPECT_EQ(options.kv_groups, 8);
  EXPECT_EQ(options.alpha, 0.05);
  EXPECT_EQ(options.pooling, "mean");
  EXPECT_EQ(options.batch_size, 2048);
  EXPECT_EQ(options.inputs_length, 512);
  EXPECT_EQ(options.optimizer, "adafactor");
  EXPECT_EQ(options.parent_steps, 1000000);
}

TEST_F(OptionsTest, HelpNamesEveryOptionAndTheExitCodes) {
  make_quickstart_folders();
  const std::string text = help();
  for (const auto& [name, value] : parse_options({"--uptrain"}).resolved) {
    EXPECT_TRUE(contains(text, "--" + name)) << name;
  }
  EXPECT_TRUE(contains(text, "75"));
}

}  // namespace
}  // namespace regroup
