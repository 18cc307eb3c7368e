// PyTorch's files of a state dict, as torch.save() writes them (pytorch_model.bin; torch/serialization.py):
// since 1.6 a zip archive with <root>/data.pkl, a pickle of the dictionary of tensors, and <root>/data/<key>,
// their elements; before it a row of pickles (magic number, protocol, system, dictionary, keys) and, for each
// key, a count (int64) with as many elements. The pickle is read as data (pickle.h); no code is run.
#pragma once

#include <vector>

#include "kernels/base/file.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {

// Whether the file begins as one of the two does, and as no safetensors file can.
bool is_torch_file(const InputFile& file);

// The tensors of a flat dictionary, in its order; several may have the same bytes. UserError naming file and
// tensor for everything else: an entry that is no tensor, a name that is no text, or given twice; a call or
// an opcode that tensors do not need; strides other than those of a row-major tensor or the transpose of a
// row-major matrix; a tensor that reaches beyond its storage, a storage beyond the file or of another size
// than it is said to have; big-endian elements; and as read_zip_directory() and read_pickle(). Throws nothing
// else, whatever the bytes are, but what InputFile does where the disk fails.
std::vector<StoredTensor> read_torch_tensors(const InputFile& file);

}  // namespace regroup
