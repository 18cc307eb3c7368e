#include "trainer/formats/streamed_writer.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {
namespace {

constexpr index_t kPieceElements = index_t{2} << 20;

// Converts and writes rows of tensors, one piece at a time.
class PieceWriter {
 public:
  PieceWriter(const ReadTensorRows& read, Heartbeat& heartbeat) : read_(read), heartbeat_(heartbeat) {}

  void write(const SharedOutputFile& file, const StoredTensor& tensor, std::uint64_t tensor_begin,
             index_t begin, index_t end) {
    heartbeat_.beat("exporting tensors");
    std::vector<index_t> shape = tensor.shape.empty() ? std::vector<index_t>{1} : tensor.shape;
    index_t row = 1;
    for (std::size_t d = 1; d < shape.size(); ++d) row *= shape[d];
    shape[0] = end - begin;
    const index_t count = (end - begin) * row;
    values_.resize(static_cast<std::size_t>(count));
    read_(tensor.name, begin, end, Tensor(values_.data(), DType::kFloat32, shape));
    require_storable(tensor);
    stored_.resize(static_cast<std::size_t>(count * size_of(tensor.type)));
    store_elements(values_.data(), count, tensor.type, stored_.data());
    file.write(tensor_begin + static_cast<std::uint64_t>(begin * row * size_of(tensor.type)), stored_);
  }

 private:
  void require_storable(const StoredTensor& tensor) const {
    if (!all_finite(values_.data(), static_cast<index_t>(values_.size()))) {
      throw UserError("tensor '{}' holds values that are not finite", tensor.name);
    }
    if (tensor.type != StoredType::kF16) return;
    constexpr float kMost = 65520;  // what rounds to more than the largest half
    const auto found =
        std::find_if(values_.begin(), values_.end(), [](float value) { return std::abs(value) >= kMost; });
    if (found == values_.end()) return;
    throw UserError("tensor '{}' holds {}, which is too large for fp16: export it as bf16 or fp32",
                    tensor.name, *found);
  }

  const ReadTensorRows& read_;
  Heartbeat& heartbeat_;
  std::vector<float> values_;
  std::vector<std::byte> stored_;
};

}  // namespace

void write_streamed(const ProcessGroup& world, const std::filesystem::path& directory,
                    const std::string& stem, std::span<const StoredTensor> tensors,
                    const ReadTensorRows& read, const FileOptions& options) {
  const FilePlan plan = plan_files(stem, tensors, options);
  world.run_on(0, [&] {
    for (const PlannedFile& file : plan.files) create_file(directory / file.name, file.bytes);
    for (const auto& [name, text] : plan.indexes) write_text(directory / name, text);
  });
  world.run_together([&] {
    PieceWriter pieces(read, world.heartbeat());
    const auto ranks = static_cast<std::size_t>(world.size());
    const auto me = static_cast<std::size_t>(world.rank());
    std::size_t number = 0;  // of the next piece, counted through all tensors
    for (const PlannedFile& planned : plan.files) {
      const SharedOutputFile file(directory / planned.name);
      if (me == 0) file.write(0, std::as_bytes(std::span(planned.header)));
      for (const PlacedTensor& placed : planned.tensors) {
        const StoredTensor& tensor = tensors[placed.tensor];
        const index_t rows = tensor.shape.empty() ? 1 : tensor.shape[0];
        if (placed.begin == placed.end) continue;
        const auto row_bytes = (placed.end - placed.begin) / static_cast<std::uint64_t>(rows);
        const index_t row = static_cast<index_t>(row_bytes) / size_of(tensor.type);
        const index_t together = std::max<index_t>(1, kPieceElements / row);
        for (index_t begin = 0; begin < rows; begin += together) {
          if (number++ % ranks != me) continue;
          pieces.write(file, tensor, placed.begin, begin, std::min(rows, begin + together));
        }
      }
      file.sync();
    }
  });
}

}  // namespace regroup
