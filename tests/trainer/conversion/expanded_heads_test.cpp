#include "trainer/conversion/expanded_heads.h"

#include <gtest/gtest.h>

#include "tests/trainer/conversion/model_file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::Model;
using test::random_model;

// Every element of every tensor, in pieces that begin and end within heads.
TEST(ExpandedHeads, EachQueryHeadHasItsGroupsKeyAndValue) {
  const test::TemporaryDirectory directory;
  ModelConfig config = test::model(4, 8);
  config.site_kv_groups = {2, 1, 8, 4};
  const Model values = random_model(config);
  test::write_model(directory / "model.safetensors", config, values);
  const CheckpointReader reader(directory.path());
  const ExpandedReader expanding(reader, config);
  const ModelConfig multi_head = expanded(config);
  EXPECT_EQ(multi_head.all_kv_groups(), std::vector<index_t>{8});
  std::map<std::string, index_t> groups;
  for (const AttentionSite& site : attention_sites(config)) {
    groups[site.prefix + "k.weight"] = groups[site.prefix + "v.weight"] = site.kv_groups;
  }
  for (const ParameterSpec& spec : parameter_table(multi_head)) {
    const index_t width = spec.shape.size() == 2 ? spec.shape[1] : 1;
    for (std::size_t dim = 0; dim < spec.shape.size(); ++dim) {
      for (index_t begin = 0; begin < spec.shape[dim]; begin += 7) {
        const index_t end = std::min(spec.shape[dim], begin + 7);
        std::vector<index_t> shape = spec.shape;
        shape[dim] = end - begin;
        const index_t out_width = shape.size() == 2 ? shape[1] : 1;
        std::vector<float> found(static_cast<std::size_t>(shape[0] * out_width), -1);
        expanding.read(spec.name, static_cast<int>(dim), begin, end,
                       Tensor(found.data(), DType::kFloat32, shape));
        for (index_t i = 0; i < std::ssize(found); ++i) {
          index_t row = i / out_width + (dim == 0 ? begin : 0);
          const index_t column = i % out_width + (dim == 1 ? begin : 0);
          if (groups.contains(spec.name)) {
            const index_t head = row / config.d_kv;
            const index_t group = head / (config.num_heads / groups[spec.name]);
            row = group * config.d_kv + row % config.d_kv;
          }
          ASSERT_EQ(found[static_cast<std::size_t>(i)],
                    values.at(spec.name)[static_cast<std::size_t>(row * width + column)])
              << spec.name << " " << dim;
        }
      }
    }
  }
}

}  // namespace
}  // namespace regroup
