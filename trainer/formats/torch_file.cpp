#include "trainer/formats/torch_file.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "kernels/base/error.h"
#include "trainer/formats/little_endian.h"
#include "trainer/formats/pickle.h"
#include "trainer/formats/zip_archive.h"

namespace regroup {
namespace {

using Kind = PickleValue::Kind;

struct StorageClass {
  std::string_view global;
  StoredType type;
};
constexpr std::array kStorageClasses = {StorageClass{"torch.DoubleStorage", StoredType::kF64},
                                        StorageClass{"torch.FloatStorage", StoredType::kF32},
                                        StorageClass{"torch.HalfStorage", StoredType::kF16},
                                        StorageClass{"torch.BFloat16Storage", StoredType::kBF16},
                                        StorageClass{"torch.LongStorage", StoredType::kI64},
                                        StorageClass{"torch.IntStorage", StoredType::kI32},
                                        StorageClass{"torch.ShortStorage", StoredType::kI16},
                                        StorageClass{"torch.CharStorage", StoredType::kI8},
                                        StorageClass{"torch.ByteStorage", StoredType::kU8},
                                        StorageClass{"torch.BoolStorage", StoredType::kBool}};

constexpr std::string_view kOrderedDict = "collections.OrderedDict";
constexpr std::string_view kSize = "torch.Size";
constexpr std::string_view kTensor = "torch._utils._rebuild_tensor";
constexpr std::string_view kTensor2 = "torch._utils._rebuild_tensor_v2";
constexpr std::string_view kParameter = "torch._utils._rebuild_parameter";

// Everything that a pickle of tensors names.
std::vector<std::string_view> allowed_globals() {
  std::vector<std::string_view> all = {kOrderedDict, kSize, kTensor, kTensor2, kParameter};
  for (const StorageClass& row : kStorageClasses) all.push_back(row.global);
  return all;
}

// The elements of one or several tensors.
struct Storage {
  StoredType type = StoredType::kF32;
  std::uint64_t count = 0;  // elements
  std::uint64_t begin = 0;  // bytes, from the start of the file; known once it is placed
};

// The tensors of a pickle and the storages they ask for.
class StateDict {
 public:
  StateDict(const PickleValue& root, std::string where) : where_(std::move(where)) {
    if (root.kind != Kind::kDict) fail("it holds {}, not a dictionary of tensors", describe(root.kind));
    for (std::size_t i = 0; i < root.items.size(); i += 2) add(*root.items[i], *root.items[i + 1]);
  }

  // By key; to be placed before tensors() is called.
  std::unordered_map<std::string, Storage>& storages() { return storages_; }

  std::vector<StoredTensor> tensors() && {
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      tensors_[i].begin += storages_.at(keys_[i]).begin;
      tensors_[i].end += storages_.at(keys_[i]).begin;
    }
    return std::move(tensors_);
  }

 private:
  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw UserError("{}: {}", where_, fmt::format(format, std::forward<Args>(args)...));
  }
  // Of the tensor being read.
  template <class... Args>
  [[noreturn]] void fail_tensor(fmt::format_string<Args...> format, Args&&... args) const {
    fail("tensor '{}' {}", printable(name_), fmt::format(format, std::forward<Args>(args)...));
  }

  void add(const PickleValue& key, const PickleValue& value) {
    if (key.kind != Kind::kText) fail("the dictionary has {} for a name", describe(key.kind));
    name_ = key.text;
    if (has_control_characters(name_)) fail("the name '{}' has control characters", printable(name_));
    if (!names_.insert(name_).second) fail("the tensor '{}' is there twice", printable(name_));
    if (value.kind != Kind::kCall) {
      fail(
          "'{}' is {}, not a tensor; a file of tensors alone is needed, as torch.save(model.state_dict()) "
          "writes it",
          printable(name_), describe(value.kind));
    }
    const PickleValue* tensor = &value;
    if (tensor->items[0]->text == kParameter) {  // (tensor, requires_grad, hooks)
      if (arguments(*tensor).empty() || arguments(*tensor)[0]->kind != Kind::kCall) fail_tensor("is damaged");
      tensor = arguments(*tensor)[0];
    }
    add_tensor(*tensor);
  }

  static const std::vector<const PickleValue*>& arguments(const PickleValue& call) {
    return call.items[1]->items;
  }

  // _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata); _rebuild_tensor has
  // the first four.
  void add_tensor(const PickleValue& call) {
    const std::string& global = call.items[0]->text;
    const auto& values = arguments(call);
    if (global != kTensor && global != kTensor2) fail_tensor("is made by {}", printable(global));
    if (values.size() < 4 || values[0]->kind != Kind::kPersistent || values[1]->kind != Kind::kInt)
      fail_tensor("is damaged");
    if (values.size() > 6 && !(values[6]->kind == Kind::kNone || is_empty_dict(*values[6]))) {
      fail_tensor("is a view that is conjugated or negated; save a copy (tensor.clone())");
    }
    std::string key;
    const Storage& storage = storage_of(*values[0]->items[0], key);
    StoredTensor tensor = {.name = name_, .type = storage.type, .shape = numbers(*values[2])};
    const std::vector<index_t> strides = numbers(*values[3]);
    if (strides.size() != tensor.shape.size()) fail_tensor("is damaged");
    const auto bytes = stored_bytes(tensor.type, tensor.shape);
    if (!bytes) fail_tensor("has the impossible shape {}", shape_text(tensor.shape));
    if (!lies_row_major(tensor.shape, strides)) {
      tensor.transposed = strides.size() == 2 && strides[0] == 1 && strides[1] == tensor.shape[0];
      if (!tensor.transposed) {
        fail_tensor(
            "of shape {} has the strides {}, which are neither row-major nor a transpose; save a copy "
            "(tensor.contiguous())",
            shape_text(tensor.shape), shape_text(strides));
      }
    }
    const auto width = static_cast<std::uint64_t>(size_of(tensor.type));
    const auto offset = static_cast<std::uint64_t>(values[1]->number);  // a negative one is beyond any end
    if (offset > storage.count || *bytes / width > storage.count - offset) {
      fail_tensor("of shape {} at element {} reaches beyond its storage of {}", shape_text(tensor.shape),
                  values[1]->number, storage.count);
    }
    tensor.begin = offset * width;
    tensor.end = tensor.begin + *bytes;
    tensors_.push_back(std::move(tensor));
    keys_.push_back(std::move(key));
  }

  static bool is_empty_dict(const PickleValue& value) {
    return value.kind == Kind::kDict && value.items.empty();
  }

  static bool lies_row_major(const std::vector<index_t>& shape, const std::vector<index_t>& strides) {
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return true;  // no element lies anywhere
    index_t dense = 1;
    for (std::size_t d = shape.size(); d-- > 0;) {
      if (shape[d] != 1 && strides[d] != dense) return false;
      dense *= shape[d];
    }
    return true;
  }

  // A tuple of whole numbers, or torch.Size of one.
  std::vector<index_t> numbers(const PickleValue& value) const {
    constexpr std::size_t kMost = 32;
    const PickleValue* tuple = &value;
    if (tuple->kind == Kind::kCall && tuple->items[0]->text == kSize && arguments(*tuple).size() == 1) {
      tuple = arguments(*tuple)[0];
    }
    if (tuple->kind != Kind::kTuple || tuple->items.size() > kMost) fail_tensor("is damaged");
    std::vector<index_t> result;
    for (const PickleValue* item : tuple->items) {
      if (item->kind != Kind::kInt) fail_tensor("has {} in its shape or strides", describe(item->kind));
      result.push_back(item->number);
    }
    return result;
  }

  // ("storage", class, key, device, count), before 1.6 with a sixth: None, or the part of another storage.
  const Storage& storage_of(const PickleValue& id, std::string& key) {
    const auto& items = id.items;
    if (id.kind != Kind::kTuple || items.size() < 5 || items.size() > 6 || items[0]->kind != Kind::kText ||
        items[0]->text != "storage" || items[1]->kind != Kind::kGlobal || items[2]->kind != Kind::kText ||
        items[4]->kind != Kind::kInt || items[4]->number < 0) {
      fail_tensor("has a storage that cannot be read");
    }
    if (items.size() == 6 && items[5]->kind != Kind::kNone) {
      fail_tensor("has a storage that is part of another; save a copy (tensor.clone())");
    }
    const auto* const row =
        std::find_if(kStorageClasses.begin(), kStorageClasses.end(),
                     [&](const StorageClass& known) { return known.global == items[1]->text; });
    if (row == kStorageClasses.end()) fail_tensor("has a storage of {}", printable(items[1]->text));
    if (!stored_bytes(row->type, {items[4]->number})) fail_tensor("has an impossibly large storage");
    key = items[2]->text;
    const Storage storage = {.type = row->type, .count = static_cast<std::uint64_t>(items[4]->number)};
    const auto [at, fresh] = storages_.emplace(key, storage);
    if (at->second.type != storage.type || at->second.count != storage.count) {
      fail_tensor("has a storage that another tensor has with another type or size");
    }
    return at->second;
  }

  std::string where_, name_;
  std::vector<StoredTensor> tensors_;  // within their storages
  std::vector<std::string> keys_;      // of their storages
  std::unordered_map<std::string, Storage> storages_;
  std::unordered_set<std::string> names_;
};

std::uint64_t bytes_of(const Storage& storage) {
  return storage.count * static_cast<std::uint64_t>(size_of(storage.type));
}

std::vector<std::byte> read_bytes(const InputFile& file, std::uint64_t begin, std::uint64_t bytes) {
  std::vector<std::byte> result(static_cast<std::size_t>(bytes));
  file.read(begin, result);
  return result;
}

std::vector<StoredTensor> read_archive(const InputFile& file) {
  const std::string where = file.path().string();
  std::unordered_map<std::string, ZipEntry> entries;
  std::optional<std::string> root;
  for (ZipEntry& entry : read_zip_directory(file)) {
    const std::size_t slash = entry.name.find('/');
    if (slash != std::string::npos && std::string_view(entry.name).substr(slash) == "/data.pkl") {
      if (root) throw UserError("{}: the archive has two data.pkl", where);
      root = entry.name.substr(0, slash);
    }
    std::string name = entry.name;
    entries.emplace(std::move(name), std::move(entry));
  }
  if (!root) throw UserError("{}: the archive has no <root>/data.pkl; torch.save() did not write it", where);
  if (const auto order = entries.find(*root + "/byteorder"); order != entries.end()) {
    constexpr std::string_view kLittle = "little";
    const auto text = read_bytes(file, order->second.begin,
                                 std::min<std::uint64_t>(order->second.bytes, kLittle.size() + 1));
    if (std::string_view(reinterpret_cast<const char*>(text.data()), text.size()) != kLittle) {
      throw UserError(
          "{}: its tensors are big-endian, which is not read; save them on a little-endian machine", where);
    }
  }
  const ZipEntry& data = entries.at(*root + "/data.pkl");
  const std::vector<std::byte> bytes =
      read_bytes(file, data.begin, std::min<std::uint64_t>(data.bytes, kMaxPickleBytes));
  const Pickle pickle = read_pickle(bytes, allowed_globals(), where);
  StateDict dict(*pickle.root, where);
  for (auto& [key, storage] : dict.storages()) {
    const auto entry = entries.find(fmt::format("{}/data/{}", *root, key));
    if (entry == entries.end()) throw UserError("{}: the storage '{}' is missing", where, printable(key));
    if (entry->second.bytes != bytes_of(storage)) {
      throw UserError("{}: the storage '{}' has {} bytes instead of {}", where, printable(key),
                      entry->second.bytes, bytes_of(storage));
    }
    storage.begin = entry->second.begin;
  }
  return std::move(dict).tensors();
}

// The pickles that a file from before 1.6 begins with.
class PickleRow {
 public:
  explicit PickleRow(const InputFile& file)
      : where_(file.path().string()),
        bytes_(read_bytes(file, 0, std::min<std::uint64_t>(file.size(), 2 * kMaxPickleBytes))) {}

  Pickle next() {
    Pickle pickle = read_pickle(std::span(bytes_).subspan(at_), allowed_, where_);
    at_ += pickle.size;
    return pickle;
  }
  std::uint64_t read() const { return at_; }  // bytes

 private:
  std::string where_;
  std::vector<std::byte> bytes_;
  std::size_t at_ = 0;
  std::vector<std::string_view> allowed_ = allowed_globals();
};

// Magic number, protocol and system; UserError unless they are what torch.save() wrote on a little-endian
// machine.
void check_preamble(PickleRow& pickles, const std::string& where) {
  constexpr std::string_view kMagic = "\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19";  // a number of 10 bytes
  constexpr std::int64_t kProtocol = 1001;
  const Pickle magic = pickles.next();
  if (magic.root->kind != Kind::kNumber || magic.root->text != kMagic) {
    throw UserError("{}: it is a pickle, but torch.save() did not write it", where);
  }
  const Pickle protocol = pickles.next();
  if (protocol.root->kind != Kind::kInt || protocol.root->number != kProtocol) {
    throw UserError("{}: torch.save() wrote it in a version of its format that is not known", where);
  }
  const Pickle system = pickles.next();
  const auto& items = system.root->items;
  for (std::size_t i = 0; system.root->kind == Kind::kDict && i < items.size(); i += 2) {
    if (items[i]->text == "little_endian" && items[i + 1]->number == 1) return;
  }
  throw UserError("{}: its tensors are big-endian, which is not read; save them on a little-endian machine",
                  where);
}

std::vector<StoredTensor> read_pickle_row(const InputFile& file) {
  const std::string where = file.path().string();
  PickleRow pickles(file);
  check_preamble(pickles, where);
  const Pickle tensors = pickles.next();
  StateDict dict(*tensors.root, where);
  const Pickle keys = pickles.next();
  if (keys.root->kind != Kind::kList) throw UserError("{}: it has no list of storages", where);
  std::uint64_t at = pickles.read();
  std::unordered_set<std::string> placed;
  for (const PickleValue* key : keys.root->items) {
    const auto found = dict.storages().find(key->text);
    if (key->kind != Kind::kText || found == dict.storages().end() || !placed.insert(key->text).second) {
      throw UserError("{}: the storage '{}' belongs to no tensor, or is there twice", where,
                      printable(key->text));
    }
    Storage& storage = found->second;
    constexpr std::uint64_t kCountBytes = 8;
    const std::uint64_t count = little_endian(read_bytes(file, at, kCountBytes));
    at += kCountBytes;
    if (count != storage.count || bytes_of(storage) > file.size() - at) {
      throw UserError(
          "{}: the storage '{}' has {} elements instead of {}, or ends beyond the file; it is "
          "truncated or damaged",
          where, printable(key->text), count, storage.count);
    }
    storage.begin = at;
    at += bytes_of(storage);
  }
  if (placed.size() != dict.storages().size()) {
    throw UserError("{}: {} of {} storages are missing", where, dict.storages().size() - placed.size(),
                    dict.storages().size());
  }
  if (at != file.size())
    throw UserError("{}: {} bytes at the end belong to no tensor", where, file.size() - at);
  return std::move(dict).tensors();
}

bool is_zip(std::span<const std::byte> start) { return little_endian(start.first(4)) == 0x04034B50; }

}  // namespace

bool is_torch_file(const InputFile& file) {
  constexpr std::size_t kStart = 9;  // a safetensors file has the length of its header and '{'
  if (file.size() < kStart) return false;
  const std::vector<std::byte> start = read_bytes(file, 0, kStart);
  const auto protocol = std::to_integer<int>(start[1]);
  const bool pickle = start[0] == std::byte{0x80} && protocol >= 2 && protocol <= 5;
  return (is_zip(start) || pickle) && start.back() != std::byte{'{'};
}

std::vector<StoredTensor> read_torch_tensors(const InputFile& file) {
  constexpr std::size_t kStart = 4;
  const bool zip = file.size() >= kStart && is_zip(read_bytes(file, 0, kStart));
  return zip ? read_archive(file) : read_pickle_row(file);
}

}  // namespace regroup
