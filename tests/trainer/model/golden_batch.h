// The batch that a golden fixture was made of.
#pragma once

#include <span>
#include <vector>

#include "data/batch_stream.h"
#include "kernels/base/file.h"
#include "trainer/formats/checkpoint_reader.h"

namespace regroup::test {

// The ids of an I32 tensor of the file, which CheckpointReader does not read.
inline std::vector<std::int32_t> golden_ids(const std::filesystem::path& file, const StoredTensor& tensor) {
  std::vector<std::int32_t> result((tensor.end - tensor.begin) / sizeof(std::int32_t));
  InputFile(file).read(tensor.begin, std::as_writable_bytes(std::span(result)));
  return result;
}

// `reader`: of the file, which holds input_ids and labels.
inline Batch golden_batch(const std::filesystem::path& file, const CheckpointReader& reader) {
  const StoredTensor& inputs = *reader.find("input_ids");
  const StoredTensor& labels = *reader.find("labels");
  return {.size = inputs.shape[0],
          .inputs_length = inputs.shape[1],
          .targets_length = labels.shape[1],
          .input_ids = golden_ids(file, inputs),
          .targets = golden_ids(file, labels)};
}

}  // namespace regroup::test
