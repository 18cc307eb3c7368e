#include "kernels/cpu_level.h"

#include <gtest/gtest.h>

#include "kernels/make_backend.h"
#include "tests/kernels/norm_cases.h"
#include "tests/support/op_case.h"

namespace regroup::test {
namespace {

TEST(CpuLevel, HasANameThatIsReadBack) {
  for (const CpuLevel level :
       {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAvx512Bf16}) {
    EXPECT_EQ(cpu_level_from_string(name_of(level)), level);
  }
}

TEST(CpuLevel, AnUnknownNameIsRefusedWithTheNearest) {
  try {
    cpu_level_from_string("avx3");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(),
                 "there is no processor level 'avx3' (did you mean 'avx2'?); use one of portable, avx2, "
                 "avx512, avx512_bf16");
  }
}

TEST(CpuLevel, TheUsableOnesBeginWithThePortableOneAndRise) {
  const std::vector<CpuLevel>& usable = usable_cpu_levels();
  ASSERT_FALSE(usable.empty());
  for (std::size_t i = 0; i < usable.size(); ++i) EXPECT_EQ(static_cast<std::size_t>(usable[i]), i);
  EXPECT_EQ(highest_cpu_level(), usable.back());
}

// Backends of all levels live in one process; a process that is not limited takes the highest.
TEST(CpuLevel, EachUsableOneMakesABackendThatComputes) {
  for (const CpuLevel level : usable_cpu_levels()) {
    const auto backend = make_backend({.threads = 2, .cpu_level = level});
    EXPECT_EQ(backend->describe(), fmt::format("CPU ({}), 2 threads", name_of(level)));
    EXPECT_EQ(backend->multiplies_bfloat16(), processor_multiplies_bfloat16(level));
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      expect_parity(*backend, rms_norm_case(5, 1032), dtype);
    }
  }
  const auto highest = make_backend({.threads = 2});
  EXPECT_EQ(highest->describe(), fmt::format("CPU ({}), 2 threads", name_of(highest_cpu_level())));
}

}  // namespace
}  // namespace regroup::test
