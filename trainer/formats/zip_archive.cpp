#include "trainer/formats/zip_archive.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <span>
#include <unordered_set>
#include <utility>

#include "kernels/base/error.h"
#include "trainer/formats/little_endian.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {
namespace {

using Bytes = std::span<const std::byte>;

constexpr std::uint64_t kLocalSignature = 0x04034B50;
constexpr std::uint64_t kCentralSignature = 0x02014B50;
constexpr std::uint64_t kEndSignature = 0x06054B50;
constexpr std::uint64_t kEnd64Signature = 0x06064B50;
constexpr std::uint64_t kLocatorSignature = 0x07064B50;
constexpr std::uint64_t kLocalBytes = 30, kCentralBytes = 46, kEndBytes = 22, kEnd64Bytes = 56,
                        kLocatorBytes = 20;
constexpr std::uint64_t kElsewhere = 0xFFFFFFFF;  // a field that zip64 holds

std::uint64_t field(Bytes record, std::size_t at, std::size_t width) {
  return little_endian(record.subspan(at, width));
}

// What is said of an entry both in the directory and at its place.
struct Header {
  std::uint64_t flags = 0, method = 0, compressed = 0, bytes = 0;
  std::string name;
};
constexpr std::uint64_t kEncrypted = 0x0001 | 0x0040 | 0x2000;  // flags
constexpr std::uint64_t kSizesFollow = 0x0008;                  // the header at its place has none

class Reader {
 public:
  explicit Reader(const InputFile& file) : file_(file), where_(file.path().string()) {}

  std::vector<ZipEntry> entries() {
    const Directory directory = find_directory();
    std::vector<std::byte> bytes(directory.bytes);
    file_.read(directory.begin, bytes);
    std::vector<Placed> all;
    Bytes rest(bytes);
    for (std::uint64_t i = 0; i < directory.entries; ++i) all.push_back(central_entry(rest));
    if (!rest.empty()) fail("the directory has {} bytes too many", rest.size());
    check_places(all, directory.begin);
    std::vector<ZipEntry> result;
    result.reserve(all.size());
    for (Placed& placed : all) result.push_back(std::move(placed.entry));
    return result;
  }

 private:
  struct Directory {
    std::uint64_t begin = 0, bytes = 0, entries = 0;
  };
  // An entry with its header in front: bytes [header, entry.begin + entry.bytes) of the file.
  struct Placed {
    ZipEntry entry;
    std::uint64_t header = 0;
  };

  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw UserError("{}: {}", where_, fmt::format(format, std::forward<Args>(args)...));
  }

  template <std::size_t size>
  std::array<std::byte, size> record(std::uint64_t at) const {
    std::array<std::byte, size> bytes{};
    file_.read(at, bytes);
    return bytes;
  }

  // By the records that the file ends with.
  Directory find_directory() const {
    if (file_.size() < kEndBytes) fail("{} bytes are too few for a zip archive", file_.size());
    std::uint64_t end_at = file_.size() - kEndBytes;
    const auto end = record<kEndBytes>(end_at);
    if (field(end, 0, 4) != kEndSignature || field(end, 20, 2) != 0) {
      fail("it begins as a zip archive, but does not end as one; it is truncated or damaged");
    }
    Directory directory = {
        .begin = field(end, 16, 4), .bytes = field(end, 12, 4), .entries = field(end, 10, 2)};
    bool one_disk = field(end, 4, 2) == 0 && field(end, 6, 2) == 0 && field(end, 8, 2) == directory.entries;
    if (end_at >= kLocatorBytes + kEnd64Bytes) {
      const auto locator = record<kLocatorBytes>(end_at - kLocatorBytes);
      if (field(locator, 0, 4) == kLocatorSignature) {
        end_at -= kLocatorBytes + kEnd64Bytes;
        const auto end64 = record<kEnd64Bytes>(end_at);
        if (field(locator, 8, 8) != end_at || field(end64, 0, 4) != kEnd64Signature ||
            field(end64, 4, 8) != kEnd64Bytes - 12) {
          fail("its zip64 records are damaged");
        }
        const Directory wide = {
            .begin = field(end64, 48, 8), .bytes = field(end64, 40, 8), .entries = field(end64, 32, 8)};
        if ((directory.begin != kElsewhere && directory.begin != wide.begin) ||
            (directory.bytes != kElsewhere && directory.bytes != wide.bytes) ||
            (directory.entries != 0xFFFF && directory.entries != wide.entries)) {
          fail("its two end records disagree");
        }
        directory = wide;
        one_disk = one_disk && field(locator, 4, 4) == 0 && field(locator, 16, 4) <= 1 &&
                   field(end64, 16, 4) == 0 && field(end64, 20, 4) == 0 &&
                   field(end64, 24, 8) == wide.entries;
      }
    }
    if (!one_disk) fail("it is one of several parts of a zip archive");
    if (directory.entries > kMaxZipEntries || directory.bytes > kMaxZipDirectoryBytes) {
      fail("its directory has {} entries in {} bytes, more than the {} in {} that are read",
           directory.entries, directory.bytes, kMaxZipEntries, kMaxZipDirectoryBytes);
    }
    if (directory.begin > end_at || directory.bytes != end_at - directory.begin) {
      fail("its directory does not lie where it should; it is truncated or damaged");
    }
    return directory;
  }

  // The zip64 values, in the order of `fields`, of those that are elsewhere.
  void widen(Bytes extra, std::initializer_list<std::uint64_t*> fields, const std::string& name) const {
    constexpr std::uint64_t kZip64 = 1;
    const auto is_elsewhere = [](const std::uint64_t* value) { return *value == kElsewhere; };
    if (std::none_of(fields.begin(), fields.end(), is_elsewhere)) return;
    while (extra.size() >= 4) {
      const std::uint64_t id = field(extra, 0, 2), length = field(extra, 2, 2);
      extra = extra.subspan(4);
      if (length > extra.size()) break;
      Bytes values = extra.first(static_cast<std::size_t>(length));
      extra = extra.subspan(values.size());
      if (id != kZip64) continue;
      for (std::uint64_t* value : fields) {
        if (!is_elsewhere(value)) continue;
        if (values.size() < 8) fail("the zip64 sizes of entry '{}' are damaged", printable(name));
        *value = field(values, 0, 8);
        values = values.subspan(8);
      }
      return;
    }
    fail("entry '{}' has no zip64 sizes", printable(name));
  }

  // Takes the first entry off the directory, and compares it with what the file has at its place.
  Placed central_entry(Bytes& rest) {
    if (rest.size() < kCentralBytes || field(rest, 0, 4) != kCentralSignature) {
      fail("its directory is damaged");
    }
    const Bytes fixed = rest.first(kCentralBytes);
    const std::uint64_t name_bytes = field(fixed, 28, 2), extra_bytes = field(fixed, 30, 2),
                        comment_bytes = field(fixed, 32, 2);
    rest = rest.subspan(kCentralBytes);
    if (rest.size() < name_bytes + extra_bytes + comment_bytes) fail("its directory is damaged");
    Header header = {.flags = field(fixed, 8, 2),
                     .method = field(fixed, 10, 2),
                     .compressed = field(fixed, 20, 4),
                     .bytes = field(fixed, 24, 4),
                     .name = {reinterpret_cast<const char*>(rest.data()), name_bytes}};
    std::uint64_t place = field(fixed, 42, 4);
    widen(rest.subspan(name_bytes, extra_bytes), {&header.bytes, &header.compressed, &place}, header.name);
    rest = rest.subspan(name_bytes + extra_bytes + comment_bytes);

    const std::string name = printable(header.name);
    if (header.name.empty() || has_control_characters(header.name))
      fail("the name '{}' of an entry has control characters or is empty", name);
    if (!names_.insert(header.name).second) fail("the entry '{}' is there twice", name);
    if ((header.flags & kEncrypted) != 0) fail("entry '{}' is encrypted, which cannot be read", name);
    if (header.method != 0) {
      fail("entry '{}' is compressed (method {}), which torch.save() never does and is not read", name,
           header.method);
    }
    if (header.compressed != header.bytes) fail("entry '{}' has two sizes", name);
    if (field(fixed, 34, 2) != 0) fail("entry '{}' is in another part of the archive", name);
    const std::uint64_t begin = data_begin(header, place);
    return {.entry = {.name = header.name, .begin = begin, .bytes = header.bytes}, .header = place};
  }

  // Where the data of the entry whose header lies at `place` begins.
  std::uint64_t data_begin(const Header& entry, std::uint64_t place) const {
    const std::string name = printable(entry.name);
    if (file_.size() < kLocalBytes || place > file_.size() - kLocalBytes) {
      fail("entry '{}' is at byte {} of a file of {}; it is truncated or damaged", name, place, file_.size());
    }
    const auto fixed = record<kLocalBytes>(place);
    const std::uint64_t name_bytes = field(fixed, 26, 2), extra_bytes = field(fixed, 28, 2);
    const std::uint64_t begin = place + kLocalBytes + name_bytes + extra_bytes;
    if (field(fixed, 0, 4) != kLocalSignature || name_bytes != entry.name.size() || begin > file_.size()) {
      fail("entry '{}' is not where the directory says", name);
    }
    std::vector<std::byte> text(static_cast<std::size_t>(name_bytes + extra_bytes));
    file_.read(place + kLocalBytes, text);
    Header local = {.flags = field(fixed, 6, 2),
                    .method = field(fixed, 8, 2),
                    .compressed = field(fixed, 18, 4),
                    .bytes = field(fixed, 22, 4),
                    .name = {reinterpret_cast<const char*>(text.data()), name_bytes}};
    widen(Bytes(text).subspan(name_bytes), {&local.bytes, &local.compressed}, local.name);
    const auto same_size = [&](std::uint64_t size) {
      return size == entry.bytes || (size == 0 && (local.flags & kSizesFollow) != 0);
    };
    if (local.name != entry.name || local.flags != entry.flags || local.method != entry.method ||
        !same_size(local.bytes) || !same_size(local.compressed)) {
      fail("entry '{}' has another name, size or method at its place than in the directory", name);
    }
    return begin;
  }

  // Sorts them. Nothing overlaps, and all end before the directory begins.
  void check_places(std::vector<Placed>& all, std::uint64_t directory_begin) const {
    std::sort(all.begin(), all.end(), [](const Placed& a, const Placed& b) { return a.header < b.header; });
    for (std::size_t i = 0; i < all.size(); ++i) {
      const ZipEntry& entry = all[i].entry;
      const std::uint64_t limit = i + 1 < all.size() ? all[i + 1].header : directory_begin;
      if (entry.begin > limit || entry.bytes > limit - entry.begin) {
        fail("entry '{}' of {} bytes overlaps what comes next; the file is truncated or damaged",
             printable(entry.name), entry.bytes);
      }
    }
  }

  const InputFile& file_;
  std::string where_;
  std::unordered_set<std::string> names_;
};

}  // namespace

std::vector<ZipEntry> read_zip_directory(const InputFile& file) { return Reader(file).entries(); }

}  // namespace regroup
