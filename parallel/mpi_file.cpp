#include "parallel/mpi_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <fmt/ranges.h>

#include "kernels/base/file.h"
#include "parallel/mpi_handle.h"

namespace regroup {
namespace {

// A block as the file sees it: `count` runs of `bytes` bytes, `stride` bytes apart, dense in memory.
struct Runs {
  std::uint64_t offset = 0;
  std::uint64_t count = 0;
  std::uint64_t bytes = 0;
  std::uint64_t stride = 0;
  std::byte* memory = nullptr;
};

Runs runs_of(const FileBlock& block) {
  const auto width = static_cast<std::uint64_t>(block.element_bytes);
  check(block.element_bytes > 0, "a file block with elements of {} bytes", block.element_bytes);
  if (block.shape.empty()) {
    return {.offset = block.offset, .count = 1, .bytes = width, .stride = width, .memory = block.memory};
  }
  const auto dim = static_cast<std::size_t>(block.dim);
  check(block.dim >= 0 && dim < block.shape.size() && 0 <= block.begin && block.begin <= block.end &&
            block.end <= block.shape[dim],
        "[{}, {}) is not a part of dimension {} of an array of shape [{}]", block.begin, block.end, block.dim,
        fmt::join(block.shape, ", "));
  std::uint64_t outer = 1;
  std::uint64_t inner = width;
  for (std::size_t d = 0; d < block.shape.size(); ++d) {
    const auto length = static_cast<std::uint64_t>(block.shape[d]);
    if (d < dim) outer *= length;
    if (d > dim) inner *= length;
  }
  Runs runs{.offset = block.offset + static_cast<std::uint64_t>(block.begin) * inner,
            .count = outer,
            .bytes = static_cast<std::uint64_t>(block.end - block.begin) * inner,
            .stride = static_cast<std::uint64_t>(block.shape[dim]) * inner,
            .memory = block.memory};
  if (runs.bytes == runs.stride) {  // the whole array is one run
    runs.bytes *= std::exchange(runs.count, 1);
    runs.stride = runs.bytes;
  }
  if (runs.bytes == 0) runs.count = 0;
  return runs;
}

// One contiguous piece, at most kPiece bytes because MPI's block lengths are int.
struct Piece {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::byte* memory = nullptr;
};
constexpr std::uint64_t kPiece = std::uint64_t{1} << 30;

// All pieces of the blocks in the order of the file, which is the order MPI-IO demands of a view.
std::vector<Piece> pieces_of(const std::vector<FileBlock>& blocks) {
  std::vector<Piece> pieces;
  for (const FileBlock& block : blocks) {
    const Runs runs = runs_of(block);
    for (std::uint64_t run = 0; run < runs.count; ++run) {
      for (std::uint64_t done = 0; done < runs.bytes; done += kPiece) {
        pieces.push_back({.offset = runs.offset + run * runs.stride + done,
                          .bytes = std::min(kPiece, runs.bytes - done),
                          .memory = runs.memory + run * runs.bytes + done});
      }
    }
  }
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
  return pieces;
}

// An MPI datatype of bytes.
class Datatype {
 public:
  // Pieces of `lengths` bytes at byte displacements.
  Datatype(const std::vector<int>& lengths, const std::vector<MPI_Aint>& displacements) {
    check_mpi(MPI_Type_create_hindexed(narrow<int>(lengths.size()), lengths.data(), displacements.data(),
                                       MPI_BYTE, &type_),
              "MPI_Type_create_hindexed");
    check_mpi(MPI_Type_commit(&type_), "MPI_Type_commit");
  }
  ~Datatype() { MPI_Type_free(&type_); }
  Datatype(const Datatype&) = delete;
  Datatype& operator=(const Datatype&) = delete;
  MPI_Datatype get() const { return type_; }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

// Where a rank's bytes lie, in the file and in memory, piece by piece in the same order.
struct View {
  explicit View(const std::vector<Piece>& pieces)
      : file(lengths_of(pieces), displacements_of(pieces, [](const Piece& p) { return MPI_Aint(p.offset); })),
        memory(lengths_of(pieces), displacements_of(pieces, [](const Piece& p) {
                 MPI_Aint address = 0;
                 MPI_Get_address(p.memory, &address);
                 return address;
               })) {}

  static std::vector<int> lengths_of(const std::vector<Piece>& pieces) {
    std::vector<int> lengths;
    lengths.reserve(pieces.size());
    for (const Piece& piece : pieces) lengths.push_back(static_cast<int>(piece.bytes));
    return lengths;
  }
  template <class Position>
  static std::vector<MPI_Aint> displacements_of(const std::vector<Piece>& pieces, Position&& position) {
    std::vector<MPI_Aint> displacements;
    displacements.reserve(pieces.size());
    for (const Piece& piece : pieces) displacements.push_back(position(piece));
    return displacements;
  }

  Datatype file;
  Datatype memory;
};

// UserError where this process may not write files of `size` bytes: going past the limit would kill it
// (SIGXFSZ).
void check_size_limit(const std::filesystem::path& path, std::uint64_t size) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
  if (size > limit.rlim_cur) {
    throw UserError(
        "cannot write {}: it will have {} bytes and this process may write files of at most {}; "
        "raise the limit (ulimit -f)",
        path.string(), size, static_cast<std::uint64_t>(limit.rlim_cur));
  }
}

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

// Creates `path` with `size` bytes, so that a full disk is found here, by one rank, and not in the middle of
// a collective write.
void create_file(const std::filesystem::path& path, std::uint64_t size) {
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) throw UserError("cannot write {}: {}", path.string(), std::strerror(errno));
  const int failure = size == 0 ? 0 : reserve(descriptor, size);
  ::close(descriptor);
  if (failure == 0) return;
  ::unlink(path.c_str());
  throw UserError("cannot write {} ({} bytes): {}", path.string(), size, std::strerror(failure));
}

// Every rank's `code` of one MPI-IO call; UserError on every rank where it is an error on any. MPI libraries
// report some failures on some ranks only.
void agree(const ProcessGroup& group, int code, const char* call, const std::filesystem::path& path) {
  group.run_together([&] {
    if (code != MPI_SUCCESS)
      throw UserError("cannot write {}: {}: {}", path.string(), call, mpi_error_text(code));
  });
}

// Reads short runs by spans of many: one large read costs less than many small ones.
void read_spans(const InputFile& file, const Runs& runs, std::uint64_t runs_per_span) {
  std::vector<std::byte> span(runs_per_span * runs.stride);
  for (std::uint64_t first = 0; first < runs.count; first += runs_per_span) {
    const std::uint64_t count = std::min(runs_per_span, runs.count - first);
    file.read(runs.offset + first * runs.stride,
              std::span(span).first((count - 1) * runs.stride + runs.bytes));
    for (std::uint64_t i = 0; i < count; ++i) {
      std::memcpy(runs.memory + (first + i) * runs.bytes, span.data() + i * runs.stride, runs.bytes);
    }
  }
}

}  // namespace

void write_collectively(const ProcessGroup& group, const std::filesystem::path& path, std::uint64_t size,
                        std::vector<FileBlock> blocks) {
  std::vector<Piece> pieces;
  group.run_together([&] {
    pieces = pieces_of(blocks);
    std::uint64_t end = 0;
    for (const Piece& piece : pieces) {
      check(piece.offset >= end, "two blocks of {} overlap at byte {}", path.string(), piece.offset);
      end = piece.offset + piece.bytes;
      check(end <= size, "a block of {} ends at byte {}, past its {} bytes", path.string(), end, size);
    }
    check_size_limit(path, size);
  });
  group.run_on(0, [&] { create_file(path, size); });

  // Closing is collective too: after a failure on some ranks the handle stays open, as the job is ending.
  MPI_File file = MPI_FILE_NULL;
  agree(group, MPI_File_open(group.handle().get(), path.c_str(), MPI_MODE_WRONLY, MPI_INFO_NULL, &file),
        "MPI_File_open", path);
  {
    // A view must not be empty: a rank without blocks looks at a byte that it does not write.
    const View view(pieces.empty() ? std::vector<Piece>{{.offset = 0, .bytes = 1, .memory = nullptr}}
                                   : pieces);
    const char* as_is = "native";
    agree(group, MPI_File_set_view(file, 0, MPI_BYTE, view.file.get(), as_is, MPI_INFO_NULL),
          "MPI_File_set_view", path);
    const int count = pieces.empty() ? 0 : 1;
    agree(group, MPI_File_write_all(file, MPI_BOTTOM, count, view.memory.get(), MPI_STATUS_IGNORE),
          "MPI_File_write_all", path);
  }
  agree(group, MPI_File_close(&file), "MPI_File_close", path);
  group.run_together([&] {  // on every host
    sync_to_disk(path);
    const std::uint64_t written = InputFile(path).size();
    if (written != size) {
      throw UserError("cannot write {}: it has {} bytes instead of {}", path.string(), written, size);
    }
  });
}

void read_blocks(const std::filesystem::path& path, const std::vector<FileBlock>& blocks) {
  constexpr std::uint64_t kShort = std::uint64_t{32} << 10;  // a run worth a read of its own
  constexpr std::uint64_t kSpan = std::uint64_t{1} << 20;
  const InputFile file(path);
  for (const FileBlock& block : blocks) {
    const Runs runs = runs_of(block);
    const std::uint64_t runs_per_span = runs.count == 0 ? 0 : std::min(runs.count, kSpan / runs.stride);
    if (runs.bytes < kShort && runs_per_span > 1) {
      read_spans(file, runs, runs_per_span);
      continue;
    }
    for (std::uint64_t run = 0; run < runs.count; ++run) {
      file.read(runs.offset + run * runs.stride, {runs.memory + run * runs.bytes, runs.bytes});
    }
  }
}

}  // namespace regroup
