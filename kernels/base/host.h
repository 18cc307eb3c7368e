// The machine that this process runs on.
#pragma once

#include <string>

namespace regroup {

std::string host_name();

// What /proc/cpuinfo calls the processor, such as "AMD EPYC 7B13"; "unknown" where it gives no name.
std::string processor_name();

}  // namespace regroup
