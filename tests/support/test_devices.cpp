#include "tests/support/devices.h"

namespace regroup::test {

std::vector<DeviceKind> test_devices() {
  std::vector<DeviceKind> devices = {DeviceKind::kCpu};
  if (cuda_device_count() > 0) devices.push_back(DeviceKind::kCuda);
  return devices;
}

}  // namespace regroup::test
