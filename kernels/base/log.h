// One-line messages to standard error, prefixed with the rank. Passed down explicitly: there is no global
// log.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace spdlog {
class logger;
}

namespace regroup {

class Log {
 public:
  // Only rank 0 prints info lines; warnings and errors are printed by the rank that gives them.
  explicit Log(int rank = 0);

  template <class... Args>
  void info(fmt::format_string<Args...> format, Args&&... args) const {
    if (rank_ == 0) print_info(fmt::format(format, std::forward<Args>(args)...));
  }
  template <class... Args>
  void warning(fmt::format_string<Args...> format, Args&&... args) const {
    print_warning(fmt::format(format, std::forward<Args>(args)...));
  }

  template <class... Args>
  void error(fmt::format_string<Args...> format, Args&&... args) const {
    print_error(fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  void print_info(const std::string& line) const;
  void print_warning(const std::string& line) const;
  void print_error(const std::string& line) const;

  int rank_;
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace regroup
