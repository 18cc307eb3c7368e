// PyTorch's files put together by hand, so that every part of them can be wrong.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace regroup::test {

// `value` as `width` bytes, the lowest first.
inline std::string little_endian_text(std::uint64_t value, int width) {
  std::string bytes;
  for (int i = 0; i < width; ++i) bytes += static_cast<char>((value >> (8 * i)) & 0xFF);
  return bytes;
}

// ---- Pickles: parts of the program that makes a value

inline std::string pickled(const std::string& text) {
  return std::string("X") + little_endian_text(text.size(), 4) + text;
}
inline std::string pickled(std::int64_t number) {
  return std::string("\x8a\x08", 2) + little_endian_text(static_cast<std::uint64_t>(number), 8);
}
inline std::string pickled_tuple(const std::vector<std::string>& items) {
  std::string all = "(";
  for (const std::string& item : items) all += item;
  return all + "t";
}
inline std::string pickled_tuple(const std::vector<std::int64_t>& numbers) {
  std::vector<std::string> items;
  for (const std::int64_t number : numbers) items.push_back(pickled(number));
  return pickled_tuple(items);
}
inline std::string pickled_global(const std::string& module, const std::string& name) {
  return std::string("c") + module + "\n" + name + "\n";
}
inline std::string pickled_call(const std::string& global, const std::vector<std::string>& arguments) {
  return global + pickled_tuple(arguments) + "R";
}
inline std::string pickled_dict(const std::vector<std::pair<std::string, std::string>>& entries) {
  std::string all = "}(";
  for (const auto& [name, value] : entries) all += pickled(name) + value;
  return all + "u";
}
// The whole program.
inline std::string pickle_of(const std::string& value) { return std::string("\x80\x02") + value + "."; }

// A float32 tensor as _rebuild_tensor_v2 is asked for it.
struct TorchTensor {
  std::vector<std::int64_t> shape, strides;
  std::int64_t offset = 0;
  std::string key = "0";
  std::int64_t count = 0;  // elements of the storage
  std::string storage = "FloatStorage";
};
inline std::string pickled(const TorchTensor& tensor) {
  const std::string id = pickled_tuple({pickled("storage"), pickled_global("torch", tensor.storage),
                                        pickled(tensor.key), pickled("cpu"), pickled(tensor.count)}) +
                         "Q";
  return pickled_call(pickled_global("torch._utils", "_rebuild_tensor_v2"),
                      {id, pickled(tensor.offset), pickled_tuple(tensor.shape), pickled_tuple(tensor.strides),
                       "\x89", pickled_global("collections", "OrderedDict") + ")R"});
}

// ---- Zip archives

// What the directory and the entry's own header say of an entry is the same but where a field says otherwise.
struct ZipPart {
  std::string name, data;
  int flags = 0, method = 0;
  std::uint64_t bytes = ~std::uint64_t{0};        // by default those of `data`
  std::uint64_t place = ~std::uint64_t{0};        // of its header, in the directory
  std::string local_name = {};                    // by default `name`
  std::uint64_t local_bytes = ~std::uint64_t{0};  // by default as in the directory
};

inline std::string zip_of(const std::vector<ZipPart>& parts) {
  constexpr auto kNone = ~std::uint64_t{0};
  std::string file, directory;
  for (const ZipPart& part : parts) {
    const std::uint64_t bytes = part.bytes == kNone ? part.data.size() : part.bytes;
    const std::uint64_t local_bytes = part.local_bytes == kNone ? bytes : part.local_bytes;
    const std::string& local_name = part.local_name.empty() ? part.name : part.local_name;
    const auto begin = [&](std::uint64_t size) {
      return little_endian_text(static_cast<std::uint64_t>(part.flags), 2) +
             little_endian_text(static_cast<std::uint64_t>(part.method), 2) + std::string(8, '\0') +
             little_endian_text(size, 4) + little_endian_text(size, 4);
    };
    const std::uint64_t place = part.place == kNone ? file.size() : part.place;
    directory += std::string("PK\1\2\0\0\0\0", 8) + begin(bytes) + little_endian_text(part.name.size(), 2) +
                 std::string(12, '\0') + little_endian_text(place, 4) + part.name;
    file += std::string("PK\3\4\0\0", 6) + begin(local_bytes) + little_endian_text(local_name.size(), 2) +
            std::string(2, '\0') + local_name + part.data;
  }
  const std::string counts = little_endian_text(parts.size(), 2) + little_endian_text(parts.size(), 2);
  const std::string end = std::string("PK\5\6\0\0\0\0", 8) + counts +
                          little_endian_text(directory.size(), 4) + little_endian_text(file.size(), 4) +
                          std::string(2, '\0');
  return file + directory + end;
}

// An archive as torch.save() writes it: a pickle and storages, "<key>" -> bytes.
inline std::string torch_zip(const std::string& pickle,
                             const std::vector<std::pair<std::string, std::string>>& storages) {
  std::vector<ZipPart> parts = {{"archive/data.pkl", pickle}, {"archive/byteorder", "little"}};
  for (const auto& [key, data] : storages) parts.push_back({"archive/data/" + key, data});
  return zip_of(parts);
}

// The format before 1.6. `system`: the third pickle.
inline std::string torch_legacy(
    const std::string& pickle, const std::vector<std::pair<std::string, std::string>>& storages,
    int width = 4, const std::string& system = pickle_of(pickled_dict({{"little_endian", "\x88"}}))) {
  std::string keys = "](", data;
  for (const auto& [key, bytes] : storages) {
    keys += pickled(key);
    data += little_endian_text(bytes.size() / static_cast<std::size_t>(width), 8) + bytes;
  }
  return pickle_of("\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19") + pickle_of(pickled(1001)) + system +
         pickle + pickle_of(keys + "e") + data;
}

}  // namespace regroup::test
