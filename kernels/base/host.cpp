#include "kernels/base/host.h"

#include <array>
#include <unistd.h>

namespace regroup {

std::string host_name() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  return name.data();
}

}  // namespace regroup
