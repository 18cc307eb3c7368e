// Writes a model's tensors as safetensors files without holding them: from whatever gives their rows.
#pragma once

#include <filesystem>
#include <functional>
#include <span>
#include <string>

#include "parallel/process_group.h"
#include "trainer/formats/file_plan.h"

namespace regroup {

// Fills `out`, dense float32, with the rows [begin, end) of a tensor (of a vector: its elements). Not
// collective.
using ReadTensorRows =
    std::function<void(const std::string& name, index_t begin, index_t end, const Tensor& out)>;

// Writes <stem>.safetensors (or shards and their index) with `tensors` (F32, F16 or BF16) into `directory`,
// which exists. The ranks share the rows, in pieces of a few MiB, each of which is read, converted and
// written by one of them; nothing else is held. Everything is on the disk on return. Collective; UserErrors
// of `read` and of the disk, and one that names a tensor with a value that is not finite or that F16 cannot
// hold.
void write_streamed(const ProcessGroup& world, const std::filesystem::path& directory,
                    const std::string& stem, std::span<const StoredTensor> tensors,
                    const ReadTensorRows& read, const FileOptions& options = {});

}  // namespace regroup
