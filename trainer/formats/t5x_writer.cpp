#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/formats/names.h"
#include "trainer/formats/t5x.h"

namespace regroup {
namespace {

using nlohmann::json;

constexpr index_t kChunkElements = (index_t{64} << 20) / 4;
constexpr int kVersion = 3;
constexpr std::array kSlots = {"m", "v", "v_col", "v_row"};

// An array within the tree: an extension of type 1 with [shape, type, elements].
json inline_array(const std::vector<index_t>& shape, const char* type,
                  const std::vector<std::uint8_t>& bytes) {
  return json::binary(json::to_msgpack(json::array({shape, type, json::binary(bytes)})), /*subtype=*/1);
}

// As TensorStore describes an array.
json description(const std::string& name, const ZarrMetadata& metadata) {
  return {{"driver", "zarr"},
          {"dtype", "float32"},
          {"kvstore", {{"driver", "file"}, {"path", name + "/"}}},
          {"metadata",
           {{"chunks", metadata.chunks},
            {"compressor", {{"id", "gzip"}, {"level", 1}}},
            {"shape", metadata.shape}}}};
}

std::string directory_name(std::string path) {
  std::replace(path.begin(), path.end(), '/', '.');
  return path;
}

// The parts of "<parameter>.second_moment_row"; the second is empty for a parameter.
std::pair<std::string, std::string> split_name(const std::string& name) {
  const std::size_t cut = name.rfind(".second_moment");
  if (cut == std::string::npos) return {name, ""};
  return {name.substr(0, cut), name.substr(cut)};
}

}  // namespace

std::vector<index_t> t5x_chunks(const std::vector<index_t>& shape, index_t elements) {
  check(elements >= 1, "chunks of {} elements", elements);
  std::vector<index_t> chunks = shape;
  const auto total = [&chunks] {
    index_t product = 1;
    for (const index_t extent : chunks) product *= extent;
    return product;
  };
  while (total() > elements) {
    const auto longest = std::max_element(chunks.begin(), chunks.end());
    const index_t extent = shape[static_cast<std::size_t>(longest - chunks.begin())];
    do {
      --*longest;
    } while (extent % *longest != 0);
  }
  return chunks;
}

T5xWriter::T5xWriter(std::filesystem::path directory, const std::vector<T5xTensor>& tensors)
    : directory_(std::move(directory)) {
  std::map<std::string, std::vector<index_t>> shapes;
  for (const T5xTensor& tensor : tensors) shapes.emplace(tensor.name, tensor.shape);
  for (const T5xTensor& tensor : tensors) {
    const auto [parameter, slot] = split_name(tensor.name);
    const std::optional<OtherName> name = t5x_name_of(parameter);
    const auto of = shapes.find(parameter);
    if (!name || of == shapes.end()) throw UserError("T5X has no name for the tensor '{}'", tensor.name);
    const auto in_file = [&](std::vector<index_t> shape) {
      if (name->transposed && shape.size() == 2) std::swap(shape[0], shape[1]);
      return shape;
    };
    std::string path = "target/" + name->name;
    if (slot == ".second_moment") {
      path = "state/param_states/" + name->name + "/v";
    } else if (!slot.empty()) {
      check(of->second.size() == 2, "'{}' of a tensor of shape {}", tensor.name, shape_text(of->second));
      const FactoredSlots slots = factored_slots(in_file(of->second), name->transposed);
      path = fmt::format("state/param_states/{}/{}", name->name,
                         slot == ".second_moment_row" ? slots.row : slots.column);
    }
    const std::vector<index_t> shape = in_file(tensor.shape);
    arrays_.push_back(
        {.path = std::move(path),
         .metadata = {.shape = shape, .chunks = t5x_chunks(shape, kChunkElements), .compressed = true},
         .transposed = name->transposed && shape.size() == 2});
  }
}

void T5xWriter::write(std::size_t i, index_t chunk, const ReadSlice& read) {
  const Array& array = arrays_.at(i);
  const std::filesystem::path directory = directory_ / directory_name(array.path);
  regroup::create_directories(directory);
  written_.insert(write_zarr_chunk(directory, array.metadata, array.transposed, chunk, read));
  written_.insert(directory);
  if (chunk != 0) return;
  const std::string text = to_json(array.metadata);
  const std::filesystem::path own = directory / ".zarray";
  create_file(own, text.size());
  SharedOutputFile(own).write(0, std::as_bytes(std::span(text)));
  written_.insert(own);
}

void T5xWriter::sync() const {
  for (const std::filesystem::path& path : written_) sync_to_disk(path);
}

void T5xWriter::write_index(index_t step) const {
  const json unused = inline_array({1}, "float32", std::vector<std::uint8_t>(4));
  json optimizer = {{"target", json::object()}, {"state", {{"param_states", json::object()}}}};
  const auto place = [&optimizer](const std::string& path) -> json& {
    return optimizer[json::json_pointer("/" + path)];
  };
  for (const Array& array : arrays_) {
    constexpr std::string_view kParameters = "target/";
    if (!array.path.starts_with(kParameters)) continue;
    for (const char* slot : kSlots) {
      place(fmt::format("state/param_states/{}/{}", array.path.substr(kParameters.size()), slot)) = unused;
    }
  }
  for (const Array& array : arrays_) {
    place(array.path) = description(directory_name(array.path), array.metadata);
  }
  std::vector<std::uint8_t> bytes(4);
  for (std::size_t i = 0; i < 4; ++i)
    bytes[i] = static_cast<std::uint8_t>(narrow<std::int32_t>(step) >> (8 * i));
  optimizer["state"]["step"] = inline_array({}, "int32", bytes);
  const std::vector<std::uint8_t> text =
      json::to_msgpack({{"version", kVersion}, {"optimizer", std::move(optimizer)}});
  OutputFile file(directory_ / "checkpoint");
  file.write(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace regroup
