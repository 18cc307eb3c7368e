#include "kernels/base/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_color_sinks.h>

namespace regroup {

Log::Log(int rank) : rank_(rank) {
  logger_ =
      std::make_shared<spdlog::logger>("regroup", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger_->set_pattern(fmt::format("[%H:%M:%S] [rank {}] %^%v%$", rank));
}

void Log::print_info(const std::string& line) const { logger_->info(line); }

void Log::print_warning(const std::string& line) const { logger_->warn(line); }

void Log::print_error(const std::string& line) const { logger_->error(line); }

}  // namespace regroup
