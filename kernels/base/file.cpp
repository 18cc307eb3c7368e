#include "kernels/base/file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <system_error>
#include <unistd.h>

#include <xxhash.h>

#include "kernels/base/error.h"

namespace regroup {

void throw_file_error(const char* what, const std::filesystem::path& path, int code) {
  if (needs_a_person(code)) throw UserError("cannot {} {}: {}", what, path.string(), std::strerror(code));
  throw SystemError("cannot {} {}: {}", what, path.string(), std::strerror(code));
}

namespace {

constexpr std::uint64_t kBlock = std::uint64_t{1} << 20;

// Open descriptor that closes itself; for the short-lived uses in this file.
class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC)) {
    if (fd_ < 0) throw_file_error("open", path, errno);
  }
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Gives the open file `size` bytes, taken from the disk where the file system can do so. 0 or errno.
int reserve(int descriptor, std::uint64_t size) {
  struct statvfs disk {};
  const bool known = ::fstatvfs(descriptor, &disk) == 0 && disk.f_blocks > 0;
  if (known && size / disk.f_frsize > disk.f_bavail) return ENOSPC;  // before the disk is filled in vain
  const auto length = static_cast<off_t>(size);
  int failure = EINTR;
  while (failure == EINTR) failure = ::fallocate(descriptor, 0, 0, length) == 0 ? 0 : errno;
  if (failure == EOPNOTSUPP || failure == ENOSYS) return ::ftruncate(descriptor, length) == 0 ? 0 : errno;
  return failure;
}

std::filesystem::path parent_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

}  // namespace

InputFile::InputFile(std::filesystem::path path, Caching caching) : path_(std::move(path)) {
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw_file_error("read", path_, errno);
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    throw UserError("cannot read {}: it is not a regular file", path_.string());
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
  if (caching == Caching::kPast) direct_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);  // or not
}

InputFile::~InputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (direct_ >= 0) ::close(direct_);
}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      direct_(std::exchange(other.direct_, -1)),
      size_(other.size_) {}

void InputFile::read(std::uint64_t offset, std::span<std::byte> bytes) const {
  bool past_cache = direct_ >= 0;
  std::size_t done = 0;
  while (done < bytes.size()) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data()) + done;
    const std::size_t left = bytes.size() - done;
    const bool direct =
        past_cache && (address | (offset + done)) % kDirectAlignment == 0 && left >= kDirectAlignment;
    const ssize_t got = ::pread(direct ? direct_ : descriptor_, bytes.data() + done,
                                direct ? left / kDirectAlignment * kDirectAlignment : left,
                                static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && direct && errno == EINVAL) {  // the file system asks for more than is known here
      past_cache = false;
      continue;
    }
    if (got < 0) throw_file_error("read", path_, errno);
    if (got == 0) {
      throw UserError("{} is truncated: {} bytes at offset {} were expected, it ends at byte {}",
                      path_.string(), bytes.size(), offset, offset + done);
    }
    done += static_cast<std::size_t>(got);
  }
}

void InputFile::prefetch(std::uint64_t offset, std::uint64_t bytes) const {
  ::posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_WILLNEED);
}

OutputFile::OutputFile(std::filesystem::path path) : path_(std::move(path)) {
  aside_ = path_;
  aside_ += fmt::format(".{}.partial", ::getpid());
  descriptor_ = ::open(aside_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw_file_error("write", path_, errno);
}

OutputFile::~OutputFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(aside_.c_str());
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      aside_(std::move(other.aside_)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

void OutputFile::write(std::span<const std::byte> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t put = ::write(descriptor_, bytes.data() + done, bytes.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw_file_error("write", path_, errno);
    done += static_cast<std::size_t>(put);
  }
}

void OutputFile::write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

void OutputFile::commit() {
  if (::fsync(descriptor_) != 0) throw_file_error("write", path_, errno);
  ::close(std::exchange(descriptor_, -1));
  rename_durably(aside_, path_);
}

SharedOutputFile::SharedOutputFile(std::filesystem::path path) : path_(std::move(path)) {
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw_file_error("write", path_, errno);
  direct_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_DIRECT);  // or not: then through the cache
}

SharedOutputFile::~SharedOutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (direct_ >= 0) ::close(direct_);
}

SharedOutputFile::SharedOutputFile(SharedOutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      direct_(std::exchange(other.direct_, -1)) {}

void SharedOutputFile::write(std::uint64_t offset, std::span<const std::byte> bytes) const {
  const auto is_aligned = [&](std::size_t done) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data()) + done;
    return (address | (offset + done) | (bytes.size() - done)) % kDirectAlignment == 0;
  };
  std::size_t done = 0;
  while (done < bytes.size()) {
    const bool direct = direct_ >= 0 && is_aligned(done);
    const ssize_t put = ::pwrite(direct ? direct_ : descriptor_, bytes.data() + done, bytes.size() - done,
                                 static_cast<off_t>(offset + done));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && direct && errno == EINVAL) {  // the file system asks for more than is known here
      ::close(std::exchange(direct_, -1));
      continue;
    }
    if (put < 0) throw_file_error("write", path_, errno);
    done += static_cast<std::size_t>(put);
  }
  // The disk works while the next part is made; a file system that cannot will do it all in sync().
  ::sync_file_range(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes.size()),
                    SYNC_FILE_RANGE_WRITE);
}

void SharedOutputFile::sync() const {
  if (::fdatasync(descriptor_) != 0) throw_file_error("write", path_, errno);
}

void create_file(const std::filesystem::path& path, std::uint64_t size) {
  struct rlimit limit {};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && size > limit.rlim_cur) {
    throw UserError(
        "cannot write {}: it will have {} bytes and this process may write files of at most {}; raise the "
        "limit "
        "(ulimit -f)",
        path.string(), size, static_cast<std::uint64_t>(limit.rlim_cur));
  }
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) throw_file_error("write", path, errno);
  const int failure = size == 0 ? 0 : reserve(descriptor, size);
  ::close(descriptor);
  if (failure == 0) return;
  ::unlink(path.c_str());
  throw_file_error("write", path, failure);
}

FileLock::FileLock(FileLock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

std::optional<FileLock> FileLock::attempt(const std::filesystem::path& path, std::string_view owner) {
  FileLock lock;
  lock.descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock.descriptor_ < 0) throw_file_error("write", path, errno);
  if (::flock(lock.descriptor_, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return std::nullopt;
    const int code = errno;
    if (code == ENOSYS || code == EOPNOTSUPP || code == ENOLCK) {
      throw UserError(
          "cannot lock {}: {}: mount the file system with locks (Lustre: -o flock, NFS: version 4), or use a "
          "folder on another one",
          path.string(), std::strerror(code));
    }
    throw_file_error("lock", path, code);
  }
  if (::ftruncate(lock.descriptor_, 0) != 0 ||
      ::pwrite(lock.descriptor_, owner.data(), owner.size(), 0) != static_cast<ssize_t>(owner.size())) {
    throw_file_error("write", path, errno);
  }
  return lock;
}

FileLock::~FileLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::string read_text(const std::filesystem::path& path, std::uint64_t limit) {
  const InputFile file(path);
  if (file.size() > limit) {
    throw UserError("{} has {} bytes; at most {} are allowed for such a file", path.string(), file.size(),
                    limit);
  }
  std::string text(file.size(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text.data(), text.size())));
  return text;
}

void write_text(const std::filesystem::path& path, std::string_view text) {
  OutputFile file(path);
  file.write(text);
  file.commit();
}

void sync_to_disk(const std::filesystem::path& path) {
  const Descriptor file(path, O_RDONLY);
  // EINVAL: a file system that cannot flush directories.
  if (::fsync(file.get()) != 0 && errno != EINVAL) throw_file_error("flush", path, errno);
}

void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::error_code error;
  std::filesystem::rename(from, to, error);
  if (error) throw_file_error("rename", from, error.value());
  sync_to_disk(parent_of(to));
}

void remove_tree(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) throw_file_error("remove", path, error.value());
}

void create_directories(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) throw_file_error("create the directory", path, error.value());
  if (!std::filesystem::is_directory(path)) {
    throw UserError("cannot create the directory {}: a file of that name is in the way", path.string());
  }
}

std::uint64_t checksum(std::span<const std::byte> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::uint64_t checksum_file(const std::filesystem::path& path, const std::function<void()>& progress) {
  const InputFile file(path);
  const std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state(XXH3_createState(),
                                                                              XXH3_freeState);
  XXH3_64bits_reset(state.get());
  std::vector<std::byte> block(std::min(kBlock, file.size()));
  for (std::uint64_t offset = 0; offset < file.size(); offset += kBlock) {
    if (progress) progress();
    const auto part = std::span(block).first(std::min(kBlock, file.size() - offset));
    file.read(offset, part);
    XXH3_64bits_update(state.get(), part.data(), part.size());
  }
  return XXH3_64bits_digest(state.get());
}

}  // namespace regroup
