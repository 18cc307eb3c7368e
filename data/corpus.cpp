#include "data/corpus.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/file.h"

namespace regroup {

static_assert(std::endian::native == std::endian::little, "the corpus format is little-endian");

// A file mapped for reading, whole.
class Corpus::MappedFile {
 public:
  MappedFile(const std::filesystem::path& path, std::uint64_t expected_bytes) : path_(path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw_file_error("read", path, errno);
    struct stat status {};
    const bool regular = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? static_cast<std::uint64_t>(status.st_size) : 0;
    if (!regular || size_ != expected_bytes) {
      ::close(descriptor);
      throw UserError(
          "{} has {} bytes where its manifest says {}; the corpus is truncated or damaged, prepare it again",
          path.string(), size_, expected_bytes);
    }
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
    const int error = errno;
    ::close(descriptor);
    if (data_ == MAP_FAILED) throw_file_error("map", path, error);
  }
  ~MappedFile() {
    if (data_) ::munmap(data_, size_);
  }
  MappedFile(MappedFile&& other) noexcept
      : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  MappedFile& operator=(MappedFile&&) = delete;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  std::filesystem::path path_;
  void* data_ = nullptr;
  std::uint64_t size_ = 0;
};

struct Corpus::MappedShard {
  std::int64_t begin;  // of its tokens in the split
  std::int64_t tokens;
  MappedFile tokens_file;
  MappedFile documents_file;
};

namespace {

void require_checksum(const std::filesystem::path& path, std::uint64_t found, std::uint64_t expected) {
  if (found == expected) return;
  throw UserError(
      "{} has checksum {:016x} where its manifest says {:016x}; the corpus is damaged, prepare it again",
      path.string(), found, expected);
}

// Copies tokens of type T, and returns the largest.
template <class T>
std::int64_t widen(std::span<const std::byte> bytes, std::int64_t first, std::span<std::int32_t> out) {
  const T* tokens = reinterpret_cast<const T*>(bytes.data()) + first;
  T largest = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    largest = std::max(largest, tokens[i]);
    out[i] = static_cast<std::int32_t>(tokens[i]);
  }
  return static_cast<std::int64_t>(largest);
}

}  // namespace

Corpus::Corpus(std::filesystem::path folder) : folder_(std::move(folder)) {
  const auto path = folder_ / kManifestFile;
  if (!std::filesystem::exists(path)) {
    throw UserError("there is no corpus at {} (no {}); make one with --prepare-data", folder_.string(),
                    kManifestFile);
  }
  const std::string text = read_text(path);
  manifest_ = parse_manifest(text, path.string());
  fingerprint_ = checksum(std::as_bytes(std::span(text.data(), text.size())));
  const InputFile tokenizer(
      tokenizer_file());  // checkpoints carry a copy: better missed now than at the first save
  for (const Split split : kSplits) {
    std::int64_t begin = 0;
    for (const auto& shard : manifest_.shards(split)) {
      const auto tokens = static_cast<std::int64_t>(shard.tokens);
      shards_[static_cast<std::size_t>(split)].push_back(
          {begin, tokens, MappedFile(folder_ / shard.tokens_file, shard.tokens * manifest_.token_bytes),
           MappedFile(folder_ / shard.documents_file, shard.documents * sizeof(std::uint64_t))});
      begin += tokens;
    }
  }
}

Corpus::~Corpus() = default;
Corpus::Corpus(Corpus&&) noexcept = default;
Corpus& Corpus::operator=(Corpus&&) noexcept = default;

void Corpus::read(Split split, std::int64_t begin, std::span<std::int32_t> out) const {
  const auto count = static_cast<std::int64_t>(out.size());
  check(begin >= 0 && count <= tokens(split) && begin <= tokens(split) - count,
        "tokens [{}, {}) are outside the {} split of {}", begin, begin + count, name_of(split),
        tokens(split));
  const auto& shards = shards_[static_cast<std::size_t>(split)];
  auto shard =
      std::upper_bound(shards.begin(), shards.end(), begin,
                       [](std::int64_t position, const MappedShard& s) { return position < s.begin; });
  if (shard != shards.begin()) --shard;
  while (!out.empty()) {
    const std::int64_t first = begin - shard->begin;
    const auto part = out.first(static_cast<std::size_t>(
        std::min<std::int64_t>(shard->tokens - first, static_cast<std::int64_t>(out.size()))));
    const auto bytes = shard->tokens_file.bytes();
    const std::int64_t largest = manifest_.token_bytes == 2 ? widen<std::uint16_t>(bytes, first, part)
                                                            : widen<std::uint32_t>(bytes, first, part);
    if (largest >= static_cast<std::int64_t>(manifest_.pieces)) {
      throw UserError(
          "{} holds the token {}, its vocabulary {} pieces; the corpus is damaged, prepare it again",
          shard->tokens_file.path().string(), largest, manifest_.pieces);
    }
    out = out.subspan(part.size());
    begin += static_cast<std::int64_t>(part.size());
    ++shard;
  }
}

std::vector<std::int64_t> Corpus::document_starts(Split split, std::size_t shard) const {
  const auto& mapped = shards_[static_cast<std::size_t>(split)].at(shard);
  const auto bytes = mapped.documents_file.bytes();
  std::vector<std::int64_t> starts(bytes.size() / sizeof(std::uint64_t));
  if (!bytes.empty()) std::memcpy(starts.data(), bytes.data(), bytes.size());
  std::int64_t last = -1;
  for (auto& start : starts) {
    if (start <= last || start >= mapped.tokens) {
      throw UserError("{} is damaged: its document starts are not ascending in [0, {})",
                      mapped.documents_file.path().string(), mapped.tokens);
    }
    last = start;
    start += mapped.begin;
  }
  return starts;
}

void Corpus::verify(int part, int parts, Heartbeat* heartbeat) const {
  const auto require = [heartbeat](const std::filesystem::path& path, std::uint64_t expected) {
    const auto beat = [heartbeat] {
      if (heartbeat != nullptr) heartbeat->beat("checking the corpus");
    };
    require_checksum(path, checksum_file(path, beat), expected);
  };
  require(tokenizer_file(), manifest_.tokenizer_checksum);
  int number = 0;
  for (const Split split : kSplits) {
    const auto& mapped = shards_[static_cast<std::size_t>(split)];
    for (std::size_t i = 0; i < mapped.size(); ++i) {
      if (number++ % parts != part) continue;
      const auto& shard = manifest_.shards(split)[i];
      require(mapped[i].tokens_file.path(), shard.tokens_checksum);
      require(mapped[i].documents_file.path(), shard.documents_checksum);
      document_starts(split, i);
    }
  }
}

}  // namespace regroup
