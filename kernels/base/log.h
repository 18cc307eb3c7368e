// One-line messages to standard error, prefixed with the rank. Passed down explicitly: there is no global
// log.
#pragma once

#include <memory>
#include <utility>

#include <fmt/format.h>
#include <spdlog/logger.h>

namespace regroup {

class Log {
 public:
  // Only rank 0 prints info lines; warnings and errors are printed by the rank that gives them.
  explicit Log(int rank = 0);

  template <class... Args>
  void info(fmt::format_string<Args...> format, Args&&... args) const {
    if (rank_ == 0) logger_->info(fmt::format(format, std::forward<Args>(args)...));
  }
  template <class... Args>
  void warning(fmt::format_string<Args...> format, Args&&... args) const {
    logger_->warn(fmt::format(format, std::forward<Args>(args)...));
  }

  template <class... Args>
  void error(fmt::format_string<Args...> format, Args&&... args) const {
    logger_->error(fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  int rank_;
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace regroup
