// Files: RAII descriptors, exact reads, writes that appear whole or not at all, checksums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace regroup {

// Errors of everything here name the file: UserError where a person has to put something right (missing, no
// permission, disk full, read-only, a limit, no locks), SystemError where the same call may succeed later.

// Throws what a call that failed with errno `code` means: "cannot read /a/file: No such file or directory".
[[noreturn]] void throw_file_error(const char* what, const std::filesystem::path& path, int code);

inline constexpr std::size_t kDirectAlignment = 4096;  // bytes

// Whether reading goes through the system's cache, or past it where the file system can and offset and
// address are multiples of kDirectAlignment (but for less than so many bytes at the end).
enum class Caching { kThrough, kPast };

// A file opened for reading. Move-only; closed on destruction. UserError where it is shorter than asked.
class InputFile {
 public:
  explicit InputFile(std::filesystem::path path, Caching caching = Caching::kThrough);
  ~InputFile();
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&&) = delete;
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::uint64_t size() const { return size_; }  // bytes
  // Fills `bytes` from `offset`. Throws UserError ("truncated") where the file ends before.
  void read(std::uint64_t offset, std::span<std::byte> bytes) const;
  // Lets the system begin to read what will be asked for soon.
  void prefetch(std::uint64_t offset, std::uint64_t bytes) const;

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  int direct_ = -1;  // the same file past the cache
  std::uint64_t size_ = 0;
};

// A file being written beside its final name; commit() makes it appear there whole (fsync, rename, fsync of
// the directory). Without commit() the destructor removes it.
class OutputFile {
 public:
  explicit OutputFile(std::filesystem::path path);
  ~OutputFile();
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path aside_;
  int descriptor_ = -1;
};

// A file that is there already and whose parts several processes write. Move-only.
class SharedOutputFile {
 public:
  explicit SharedOutputFile(std::filesystem::path path);
  ~SharedOutputFile();
  SharedOutputFile(SharedOutputFile&& other) noexcept;
  SharedOutputFile& operator=(SharedOutputFile&&) = delete;
  SharedOutputFile(const SharedOutputFile&) = delete;
  SharedOutputFile& operator=(const SharedOutputFile&) = delete;

  // Writes `bytes` at `offset`, past the system's cache where the file system can and offset, size and
  // address are multiples of kDirectAlignment; otherwise the system at least begins to bring them to the
  // disk.
  void write(std::uint64_t offset, std::span<const std::byte> bytes) const;
  // Returns when everything written is on the disk.
  void sync() const;

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  mutable int direct_ = -1;  // the same file past the cache
};

// Creates (or truncates) `path` with `size` bytes taken from the disk, where the file system can do so: a
// full disk, or a limit of the process, is found before anything is written. Errors as SharedOutputFile.
void create_file(const std::filesystem::path& path, std::uint64_t size);

// An advisory lock on a file (flock); held until destruction or the end of the process, however it ends.
// Where the process was on another machine a file system may take minutes to notice its end.
class FileLock {
 public:
  // Makes the file if need be, locks it, and makes `owner` its text. Nothing where another process holds it.
  static std::optional<FileLock> attempt(const std::filesystem::path& path, std::string_view owner);
  ~FileLock();
  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  FileLock() = default;

  int descriptor_ = -1;
};

// The whole file as text. Throws UserError where it cannot be read or is larger than `limit` bytes.
std::string read_text(const std::filesystem::path& path, std::uint64_t limit = std::uint64_t{1} << 30);
// Writes `text` so that `path` holds either its old content or all of the new.
void write_text(const std::filesystem::path& path, std::string_view text);

// Flushes a file's, or a directory's entries', data to the disk.
void sync_to_disk(const std::filesystem::path& path);
// Removes a file, or a directory with all that is in it; nothing where it is not there.
void remove_tree(const std::filesystem::path& path);
// Renames and makes the new name durable.
void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to);
// Creates `path` and its parents.
void create_directories(const std::filesystem::path& path);

// XXH3, 64 bits, of the bytes.
std::uint64_t checksum(std::span<const std::byte> bytes);
// XXH3 over a whole file, streamed; `progress` is called before every megabyte.
std::uint64_t checksum_file(const std::filesystem::path& path, const std::function<void()>& progress = {});

}  // namespace regroup
