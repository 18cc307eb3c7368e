#include "kernels/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>

namespace regroup {

Log::Log(int rank) : rank_(rank) {
  logger_ =
      std::make_shared<spdlog::logger>("regroup", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger_->set_pattern(fmt::format("[%H:%M:%S] [rank {}] %^%v%$", rank));
}

}  // namespace regroup
