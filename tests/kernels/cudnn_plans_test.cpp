// cuDNN has a plan for every attention of a T5, on A100 and H100, forward and backward. The plans are built
// from descriptions of the devices (CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION): kernels are found and
// compiled, none runs, and no GPU is needed.
#include <gtest/gtest.h>

#include "kernels/cuda/cudnn_attention_graph.h"

namespace regroup::test {
namespace {

// From NVIDIA's data sheets and the CUDA programming guide, "Compute Capabilities".
constexpr const char* kH100 =
    R"({"deviceName": "NVIDIA H100 80GB HBM3", "deviceVer": 900, "multiProcessorCount": 132,
        "maxSharedMemoryPerBlockOptin": 232448, "l2CacheSize": 52428800, "smClockRateKHz": 1980000,
        "memClockRateKHz": 2619000, "totalGlobalMem": 85899345920, "pciDeviceId": 9008)";
constexpr const char* kA100 =
    R"({"deviceName": "NVIDIA A100-SXM4-80GB", "deviceVer": 800, "multiProcessorCount": 108,
        "maxSharedMemoryPerBlockOptin": 166912, "l2CacheSize": 41943040, "smClockRateKHz": 1410000,
        "memClockRateKHz": 1593000, "totalGlobalMem": 85899345920, "pciDeviceId": 8368)";
// What the two have alike.
constexpr const char* kBoth =
    R"(, "driverVer": 13000, "cudaDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1, "warpSize": 32,
        "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "maxThreadsPerBlock": 1024,
        "maxThreadsPerSM": 2048, "maxCtasPerSM": 32, "regsPerBlock": 65536, "maxRegistersPerSM": 65536,
        "maxSharedMemoryPerBlock": 49152, "reservedSharedMemoryPerBlock": 1024})";

struct Attention {
  const char* name;
  index_t queries, keys, heads, groups;
  bool bias, causal, padded;
  bool training = true;
};
void PrintTo(const Attention& attention, std::ostream* out) { *out << attention.name; }

// q, k and v are parts of one row, as the projections leave them; of cross-attention k and v alone.
AttentionShape shape_of(const Attention& a) {
  constexpr index_t kChannels = 64, kBatch = 8;
  const bool cross = a.queries != a.keys;
  const index_t kv = (cross ? 0 : a.heads) + 2 * a.groups, q = cross ? a.heads : kv;
  const AttentionShape::Rows q_rows{a.queries * q * kChannels, q * kChannels};
  const AttentionShape::Rows kv_rows{a.keys * kv * kChannels, kv * kChannels};
  const AttentionShape::Rows out_rows{a.queries * a.heads * kChannels, a.heads * kChannels};
  return {.batch = kBatch,
          .queries = a.queries,
          .keys = a.keys,
          .heads = a.heads,
          .groups = a.groups,
          .channels = kChannels,
          .q = q_rows,
          .k = kv_rows,
          .v = kv_rows,
          .out = out_rows,
          .bias = a.bias,
          .causal = a.causal,
          .padded = a.padded,
          .dout = out_rows,
          .dq = q_rows,
          .dk = kv_rows,
          .dv = kv_rows};
}

class CudnnPlans : public testing::TestWithParam<Attention> {
 protected:
  void SetUp() override {
    if (!CudnnAttentionPlan::in_this_build()) {
      GTEST_SKIP()
          << "this build has no cuDNN attention: cudnn_frontend.h was not found (.ci/install unpacks it)";
    }
  }
  static void expect_plan(const AttentionShape& shape) {
    for (const char* device : {kH100, kA100}) {
      EXPECT_EQ(CudnnAttentionPlan::problem_on(shape, std::string(device) + kBoth), "")
          << (shape.backward ? "backward" : "forward") << " on " << device;
    }
  }
};

TEST_P(CudnnPlans, ForwardAndBackward) {
  AttentionShape shape = shape_of(GetParam());
  expect_plan(shape);
  if (!GetParam().training) return;
  shape.backward = true;
  shape.dbias = shape.bias;
  expect_plan(shape);
}

constexpr Attention kAttentions[] = {
    {"EncoderSmall", 512, 512, 6, 6, true, false, true},
    {"EncoderBase", 512, 512, 12, 12, true, false, true},
    {"EncoderBaseOneGroup", 512, 512, 12, 1, true, false, true},
    {"EncoderLargeEightGroups", 512, 512, 16, 8, true, false, true},
    {"EncoderXxlOfEightRanks", 512, 512, 8, 1, true, false, true},
    {"EncoderXxlTwoGroups", 512, 512, 64, 2, true, false, true},
    {"EncoderLong", 2048, 2048, 16, 8, true, false, true},
    {"DecoderBase", 114, 114, 12, 12, true, true, false},
    {"DecoderXlTwoGroups", 114, 114, 32, 2, true, true, false},
    {"CrossBase", 114, 512, 12, 12, false, false, true},
    {"CrossXxlEightGroups", 114, 512, 64, 8, false, false, true},
    {"DecodeSelf", 1, 114, 12, 2, true, false, false, false},
    {"DecodeCross", 1, 512, 12, 12, false, false, true, false},
};
INSTANTIATE_TEST_SUITE_P(T5, CudnnPlans, testing::ValuesIn(kAttentions),
                         [](const auto& instance) { return std::string(instance.param.name); });

using CudnnPlan = CudnnPlans;

TEST_F(CudnnPlan, DeterministicBackward) {
  AttentionShape shape = shape_of(kAttentions[3]);
  shape.backward = shape.dbias = true;
  expect_plan(shape);
}

// That a plan is there means something: there is none for what cuDNN cannot do.
TEST_F(CudnnPlan, NoneForAnOddHead) {
  AttentionShape shape = shape_of(kAttentions[1]);
  shape.channels = 60;
  EXPECT_NE(CudnnAttentionPlan::problem_on(shape, std::string(kH100) + kBoth), "");
}

}  // namespace
}  // namespace regroup::test
