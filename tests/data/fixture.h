// What the data tests share: a temporary folder, a small vocabulary, the shared reference data.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "data/tokenizer.h"
#include "kernels/base/error.h"
#include "kernels/base/random.h"

namespace regroup::test {

// A folder of the test's own, gone with it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "regroup-data-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw SystemError("mkdtemp failed");
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The message of the UserError that `action` throws; fails the test where it throws none.
template <class Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const UserError& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << "a message is one line: " << message;
    return message;
  }
  ADD_FAILURE() << "no UserError was thrown";
  return "";
}

// Lines of pseudo-random words, one document.
inline std::string make_text(std::uint64_t seed, int words) {
  static constexpr const char* kSyllables[] = {"ka",  "to", "mi",  "ran", "sel", "du",
                                               "vor", "ne", "pli", "ost", "gu",  "ber"};
  const Philox philox(seed, RandomPurpose::kTest);
  std::string text;
  for (int i = 0; i < words; ++i) {
    const Philox word = philox.child(static_cast<std::uint64_t>(i));
    for (std::uint64_t s = 0; s <= word.below(3, 100); ++s)
      text += kSyllables[word.below(std::size(kSyllables), s)];
    text += i % 12 == 11 ? ".\n" : " ";
  }
  return text + "\n";
}

// Trains a vocabulary of 120 pieces on such text.
inline std::filesystem::path make_vocabulary(const TemporaryFolder& folder) {
  write_bytes(folder / "vocabulary.txt", make_text(99, 4000));
  train_tokenizer({folder / "vocabulary.txt"}, folder / "small.model", {.vocab_pieces = 120});
  return folder / "small.model";
}

// A file of the shared reference data, which need not be there.
inline std::filesystem::path shared(const std::string& name) {
  return std::filesystem::path(REGROUP_SHARED) / "data" / name;
}

}  // namespace regroup::test

#define REGROUP_NEEDS_SHARED(name)                                        \
  if (!std::filesystem::exists(::regroup::test::shared(name))) {          \
    GTEST_SKIP() << name << " is not under REGROUP_SHARED/data; not run"; \
  }
