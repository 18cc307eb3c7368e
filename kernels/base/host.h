// The machine that this process runs on.
#pragma once

#include <string>

namespace regroup {

std::string host_name();

}  // namespace regroup
