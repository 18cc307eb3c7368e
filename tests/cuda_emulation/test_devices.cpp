#include "tests/support/devices.h"

namespace regroup::test {

std::vector<DeviceKind> test_devices() { return {DeviceKind::kCuda}; }

}  // namespace regroup::test
