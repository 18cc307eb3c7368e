// libFuzzer: whatever the bytes of a file of PyTorch, zip archive or row of pickles, its tensors are listed
// or refused with a UserError, and those that are listed lie inside the file.
#include <cstddef>
#include <cstdint>
#include <span>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/base/error.h"
#include "trainer/formats/torch_file.h"

namespace {

// A file in memory.
class MemoryFile {
 public:
  explicit MemoryFile(std::span<const std::uint8_t> bytes)
      : descriptor_(memfd_create("fuzzed", MFD_CLOEXEC)) {
    regroup::check(descriptor_ >= 0, "no file in memory");
    const auto written = ::write(descriptor_, bytes.data(), bytes.size());
    regroup::check(written == static_cast<ssize_t>(bytes.size()), "a file in memory is too short");
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return fmt::format("/proc/self/fd/{}", descriptor_); }

 private:
  int descriptor_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const MemoryFile memory(std::span(data, size));
  try {
    const regroup::InputFile file(memory.path());
    regroup::is_torch_file(file);
    for (const regroup::StoredTensor& tensor : regroup::read_torch_tensors(file)) {
      const auto bytes = regroup::stored_bytes(tensor.type, tensor.shape);
      regroup::check(tensor.begin <= tensor.end && tensor.end <= size && bytes == tensor.end - tensor.begin,
                     "a tensor outside its file, or of another size than its shape");
      regroup::check(!tensor.transposed || tensor.shape.size() == 2, "a transpose of {}",
                     regroup::shape_text(tensor.shape));
    }
  } catch (const regroup::UserError&) {
  }
  return 0;
}
