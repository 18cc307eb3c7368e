// The three kinds of failure (docs/architecture.md, "Errors"). Everything is thrown, nothing is caught
// before main(), which prints one line with the rank and ends the whole job.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace regroup {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;

  // Whether every rank throws this very error: then one of them tells the user, and nobody is left waiting.
  bool on_every_rank() const { return on_every_rank_; }
  void set_on_every_rank() { on_every_rank_ = true; }

  // Whether the user has been told already, where it could not wait for main().
  bool told() const { return told_; }
  void set_told() { told_ = true; }

 private:
  bool on_every_rank_ = false;
  bool told_ = false;
};

// Something a person has to put right: an option, a file, a tensor of a checkpoint, or what the machine lacks
// (memory, a device, locks, room on a disk). The same command fails again until then. The message says what
// is wrong, where (file, line, tensor, option) and what to do, in one line.
class UserError : public Error {
 public:
  template <class... Args>
  explicit UserError(fmt::format_string<Args...> format, Args&&... args)
      : Error(fmt::format(format, std::forward<Args>(args)...)) {}
};

// A call into the system or a library failed and may succeed at another time or on another machine: the call,
// its subject and the reason it gave.
class SystemError : public Error {
 public:
  template <class... Args>
  explicit SystemError(fmt::format_string<Args...> format, Args&&... args)
      : Error(fmt::format(format, std::forward<Args>(args)...)) {}
};

// A broken invariant: a bug in Regroup.
class InternalError : public Error {
 public:
  template <class... Args>
  explicit InternalError(fmt::format_string<Args...> format, Args&&... args)
      : Error(fmt::format(format, std::forward<Args>(args)...)) {}
};

// Throws InternalError with the formatted message unless `condition` holds.
template <class... Args>
void check(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) throw InternalError(format, std::forward<Args>(args)...);
}

// `value` as a To; InternalError naming both where it does not fit. For the borders to libraries that take
// int.
template <class To, class From>
To narrow(From value) {
  const To result = static_cast<To>(value);
  check(static_cast<From>(result) == value && (result < To{}) == (value < From{}),
        "the value {} does not fit into {} bits", value, sizeof(To) * 8);
  return result;
}

// Whether a person has to put right what made a system call fail with this errno: a missing file, a full
// disk, a limit of the process, locks that a file system does not have.
bool needs_a_person(int error_code);

// Within a catch block: throws the exception that is being handled, as one of the three. Lack of memory and
// what needs_a_person() become a UserError; whatever else the standard library throws, a SystemError.
[[noreturn]] void rethrow_as_error();

// " (did you mean 'x'?)" with the candidate nearest to `word` by edit distance, or "" when none is near.
std::string did_you_mean(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace regroup
