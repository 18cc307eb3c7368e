// Faults at chosen moments of a rank, without a hook in the program: a library for LD_PRELOAD, before which
// the calls of libc, MPI and oneDNN pass. REGROUP_FAULT in the environment says what happens and when:
//
//   ACTION@FUNCTION[:N][,rank=R][,path=REGEX][,after=FUNCTION:M]
//
// ACTION: kill (SIGKILL to itself), stop (SIGSTOP), or ENOSPC, EIO, EROFS, ENOLCK, ENOSYS, with which the
// call fails from then on. FUNCTION: a name below; NAME-after: when the call has been done. N: at the N-th
// such call (1), counted where the path in question (of rename: the new one; of a descriptor: its file's)
// contains a match, and after M calls of another function. rank: OMPI_COMM_WORLD_RANK; without it, every
// rank.
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <dlfcn.h>
#include <fcntl.h>
#include <map>
#include <memory>
#include <optional>
#include <regex>
#include <stdexcept>
#include <string>
#include <sys/file.h>
#include <sys/stat.h>
#include <type_traits>
#include <unistd.h>

#include <mpi.h>

namespace {

const std::map<std::string, int> kActions = {{"kill", -SIGKILL}, {"stop", -SIGSTOP}, {"ENOSPC", ENOSPC},
                                             {"EIO", EIO},       {"EROFS", EROFS},   {"ENOLCK", ENOLCK},
                                             {"ENOSYS", ENOSYS}};

// A function and how many of its calls.
struct Count {
  std::string function;
  int calls = 1;
};

Count count_of(const std::string& text) {
  const std::size_t colon = text.find(':');
  if (colon == std::string::npos) return {.function = text};
  return {.function = text.substr(0, colon), .calls = std::stoi(text.substr(colon + 1))};
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

class Fault {
 public:
  explicit Fault(const std::string& text) {
    try {
      if (!text.empty()) parse(text);
    } catch (const std::exception& error) {
      ::dprintf(STDERR_FILENO, "REGROUP_FAULT=%s: %s\n", text.c_str(), error.what());
      std::raise(SIGKILL);
    }
  }

  // A call of the function; `path` gives what it is about. The errno to fail with, or 0.
  template <class Path>
  int at(const char* function, Path&& path) {
    if (action_ == 0) return 0;
    if (after_ && after_->function == function) ++before_;
    if (moment_.function != function) return 0;
    if (after_ && before_ < after_->calls) return 0;
    if (path_ && !std::regex_search(std::string(path()), *path_)) return 0;
    const int call = ++calls_;
    if (call < moment_.calls) return 0;
    if (action_ > 0) return action_;
    if (call == moment_.calls) std::raise(-action_);
    return 0;
  }

 private:
  void parse(const std::string& text) {
    static const std::regex kForm(
        R"(([A-Za-z]+)@([\w-]+(?::\d+)?)(?:,rank=(\d+))?(?:,path=([^,]+))?(?:,after=([\w-]+:\d+))?)");
    std::smatch part;
    if (!std::regex_match(text, part, kForm)) throw std::invalid_argument("not of the form of a fault");
    if (part[3].matched && part[3] != environment("OMPI_COMM_WORLD_RANK")) return;
    moment_ = count_of(part[2]);
    if (part[4].matched) path_ = std::regex(part[4].str());
    if (part[5].matched) after_ = count_of(part[5]);
    action_ = kActions.at(part[1]);
  }

  int action_ = 0;  // -signal or errno; 0: none
  Count moment_;
  std::optional<std::regex> path_;
  std::optional<Count> after_;
  std::atomic<int> calls_ = 0, before_ = 0;
};

Fault& fault() {
  // Outlives the handlers of the process's end, which write too.
  static Fault& the_fault = *std::make_unique<Fault>(environment("REGROUP_FAULT")).release();
  return the_fault;
}

std::string path_of(int descriptor) {
  std::string path(4096, '\0');
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t length = ::readlink(link.c_str(), path.data(), path.size());
  path.resize(length < 0 ? 0 : static_cast<std::size_t>(length));
  return path;
}

// The call with its moments before and after. `Function` is the type of the real one.
template <class Function, class Path, class... Arguments>
auto pass(const char* name, Path&& path, Arguments... arguments) {
  using Result = std::invoke_result_t<Function, Arguments...>;
  if (const int failure = fault().at(name, path); failure != 0) {
    errno = failure;
    return static_cast<Result>(-1);
  }
  const auto real = reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
  const Result result = real(arguments...);
  const int kept = errno;
  fault().at((std::string(name) + "-after").c_str(), path);
  errno = kept;
  return result;
}

constexpr auto kNoPath = [] { return ""; };

mode_t mode_of(int flags, va_list arguments) {
  return (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_of(flags, arguments);
  va_end(arguments);
  return pass<decltype(&::open)>(
      "open", [&] { return path; }, path, flags, mode);
}

int openat(int directory, const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_of(flags, arguments);
  va_end(arguments);
  return pass<decltype(&::openat)>(
      "openat", [&] { return path; }, directory, path, flags, mode);
}

ssize_t pread(int file, void* bytes, std::size_t size, off_t offset) {
  return pass<decltype(&::pread)>(
      "pread", [&] { return path_of(file); }, file, bytes, size, offset);
}

ssize_t pwrite(int file, const void* bytes, std::size_t size, off_t offset) {
  return pass<decltype(&::pwrite)>(
      "pwrite", [&] { return path_of(file); }, file, bytes, size, offset);
}

ssize_t write(int file, const void* bytes, std::size_t size) {
  return pass<decltype(&::write)>(
      "write", [&] { return path_of(file); }, file, bytes, size);
}

int fsync(int file) {
  return pass<decltype(&::fsync)>(
      "fsync", [&] { return path_of(file); }, file);
}

int fdatasync(int file) {
  return pass<decltype(&::fdatasync)>(
      "fdatasync", [&] { return path_of(file); }, file);
}

int fallocate(int file, int mode, off_t offset, off_t length) {
  return pass<decltype(&::fallocate)>(
      "fallocate", [&] { return path_of(file); }, file, mode, offset, length);
}

int flock(int file, int operation) noexcept {
  return pass<decltype(&::flock)>(
      "flock", [&] { return path_of(file); }, file, operation);
}

int rename(const char* from, const char* to) noexcept {
  return pass<decltype(&::rename)>(
      "rename", [&] { return to; }, from, to);
}

int mkdir(const char* path, mode_t mode) noexcept {
  return pass<decltype(&::mkdir)>(
      "mkdir", [&] { return path; }, path, mode);
}

int unlink(const char* path) noexcept {
  return pass<decltype(&::unlink)>(
      "unlink", [&] { return path; }, path);
}

int unlinkat(int directory, const char* path, int flags) noexcept {
  return pass<decltype(&::unlinkat)>(
      "unlinkat", [&] { return path; }, directory, path, flags);
}

int MPI_Allreduce(const void* send, void* receive, int count, MPI_Datatype type, MPI_Op op, MPI_Comm group) {
  return pass<decltype(&MPI_Allreduce)>("MPI_Allreduce", kNoPath, send, receive, count, type, op, group);
}

int MPI_Alltoallv(const void* send, const int* send_counts, const int* send_begins, MPI_Datatype send_type,
                  void* receive, const int* receive_counts, const int* receive_begins,
                  MPI_Datatype receive_type, MPI_Comm group) {
  return pass<decltype(&MPI_Alltoallv)>("MPI_Alltoallv", kNoPath, send, send_counts, send_begins, send_type,
                                        receive, receive_counts, receive_begins, receive_type, group);
}

// As in dnnl.h, of which only kernels/cpu knows.
int dnnl_primitive_execute(const void* primitive, void* stream, int arguments, const void* argument) {
  return pass<int (*)(const void*, void*, int, const void*)>("dnnl_primitive_execute", kNoPath, primitive,
                                                             stream, arguments, argument);
}

}  // extern "C"
