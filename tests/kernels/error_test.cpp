#include "kernels/base/error.h"

#include <cerrno>
#include <filesystem>
#include <functional>
#include <new>
#include <system_error>

#include <gtest/gtest.h>

namespace regroup {
namespace {

TEST(Error, CarriesTheFormattedMessage) {
  try {
    throw UserError("{}:{}: unknown key '{}'", "a.cfg", 3, "tpp");
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "a.cfg:3: unknown key 'tpp'");
  }
}

TEST(Error, CheckThrowsOnlyWhereTheConditionFails) {
  EXPECT_NO_THROW(check(true, "never"));
  EXPECT_THROW(check(false, "{} is broken", "it"), InternalError);
}

TEST(Error, NarrowKeepsWhatFitsAndRefusesTheRest) {
  EXPECT_EQ(narrow<int>(std::int64_t{-7}), -7);
  EXPECT_EQ(narrow<std::uint16_t>(65535), 65535);
  EXPECT_THROW(narrow<int>(std::int64_t{1} << 31), InternalError);
  EXPECT_THROW(narrow<std::uint32_t>(std::int64_t{-1}), InternalError);
  EXPECT_THROW(narrow<std::int64_t>(~std::uint64_t{0}), InternalError);
}

void as_error(const std::function<void()>& work) {
  try {
    work();
  } catch (...) {
    rethrow_as_error();
  }
}

TEST(RethrowAsError, KeepsWhatIsOneOfTheThree) {
  try {
    as_error([] {
      UserError error("x");
      error.set_on_every_rank();
      throw error;
    });
    FAIL();
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(), "x");
    EXPECT_TRUE(error.on_every_rank());
  }
  EXPECT_THROW(as_error([] { throw SystemError("x"); }), SystemError);
  EXPECT_THROW(as_error([] { throw InternalError("x"); }), InternalError);
}

TEST(RethrowAsError, WhatTheMachineLacksIsForAPerson) {
  const auto file_system = [](int code) {
    throw std::filesystem::filesystem_error("x", std::error_code(code, std::generic_category()));
  };
  EXPECT_THROW(as_error([] { throw std::bad_alloc(); }), UserError);
  for (const int code : {ENOSPC, EROFS, EACCES, ENOLCK, EMFILE, ENOMEM}) {
    EXPECT_THROW(as_error([&] { file_system(code); }), UserError) << code;
  }
  for (const int code : {EIO, ESTALE, ETIMEDOUT, EAGAIN}) {
    EXPECT_THROW(as_error([&] { file_system(code); }), SystemError) << code;
  }
  EXPECT_THROW(as_error([] { throw std::runtime_error("x"); }), SystemError);
  EXPECT_THROW(as_error([] { throw 1; }), InternalError);
}

TEST(DidYouMean, NamesTheNearestCandidate) {
  const std::vector<std::string> options = {"kv-groups", "learning-rate", "batch-size"};
  EXPECT_EQ(did_you_mean("kv-group", options), " (did you mean 'kv-groups'?)");
  EXPECT_EQ(did_you_mean("lerning-rate", options), " (did you mean 'learning-rate'?)");
  EXPECT_EQ(did_you_mean("batch_size", options), " (did you mean 'batch-size'?)");
}

TEST(DidYouMean, SaysNothingWhereNothingIsNear) {
  EXPECT_EQ(did_you_mean("zzzz", {"kv-groups", "seed"}), "");
  EXPECT_EQ(did_you_mean("anything", {}), "");
}

}  // namespace
}  // namespace regroup
