// libFuzzer: whatever the bytes of a file, its header is parsed or refused with a UserError, and what is
// parsed lies inside the file.
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/base/error.h"
#include "trainer/formats/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto header =
        regroup::parse_safetensors_header(std::as_bytes(std::span(data, size)), size, "fuzzed");
    std::uint64_t end = 0;
    for (const regroup::StoredTensor& tensor : header.tensors) {
      regroup::check(tensor.begin <= tensor.end && tensor.end <= size && (end == 0 || tensor.begin == end),
                     "a tensor outside its file, or a hole");
      end = tensor.end;
    }
  } catch (const regroup::UserError&) {
  }
  return 0;
}
