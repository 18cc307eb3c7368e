// The devices that tests of ops run on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/make_backend.h"

namespace regroup::test {

// The CPU, and the GPU where this build and this host have one; in a program on the emulated GPU
// (tests/cuda_emulation) that one alone.
std::vector<DeviceKind> test_devices();

std::string name_of(DeviceKind device);  // "cpu", "cuda"
// "cuda_add_7_20_in_place": the name of a test of `what` on `device`, of the characters that gtest allows.
std::string test_name(DeviceKind device, const std::string& what);

// `threads`: of the CPU, which works at the level that REGROUP_CPU_LEVEL names, or at its highest.
std::unique_ptr<Backend> make_test_backend(DeviceKind device, int threads = 2);

// Backends that must give the same bits: any number of threads of a CPU, any run on a GPU. (In emulation each
// runs the threads of a kernel in an order of its own.)
std::vector<std::unique_ptr<Backend>> backends_of_equal_bits(DeviceKind device);

}  // namespace regroup::test
