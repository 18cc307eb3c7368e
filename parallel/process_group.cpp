#include "parallel/process_group.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <type_traits>
#include <utility>

#include "parallel/mpi_handle.h"

namespace regroup {
namespace {

// The first character of a failure that travels between ranks.
constexpr char kUserTag = 'U';
constexpr char kSystemTag = 'S';
constexpr char kInternalTag = 'I';

template <class T>
void reduce_in_place(std::span<T> values, MPI_Datatype type, ReduceOp op, MPI_Comm comm) {
  for (std::size_t begin = 0; begin < values.size(); begin += kMpiChunk) {
    const std::size_t count = std::min(kMpiChunk, values.size() - begin);
    check_mpi(
        MPI_Allreduce(MPI_IN_PLACE, values.data() + begin, static_cast<int>(count), type, mpi_op(op), comm),
        "MPI_Allreduce");
  }
}

// What every rank gives, one after another, and how many elements each gave.
template <class T>
struct Gathered {
  std::vector<T> values;
  std::vector<std::uint64_t> counts;
};

template <class T>
Gathered<T> gather(std::span<const T> mine, MPI_Datatype type, MPI_Comm comm, int size) {
  Gathered<T> all;
  all.counts.resize(static_cast<std::size_t>(size));
  const std::uint64_t count = mine.size();
  check_mpi(MPI_Allgather(&count, 1, MPI_UINT64_T, all.counts.data(), 1, MPI_UINT64_T, comm),
            "MPI_Allgather");
  std::vector<int> counts;
  std::vector<int> starts;
  std::uint64_t total = 0;
  for (const std::uint64_t n : all.counts) {
    starts.push_back(narrow<int>(total));
    counts.push_back(narrow<int>(n));
    total += n;
  }
  if (total == 0) return all;
  all.values.resize(narrow<int>(total));
  check_mpi(MPI_Allgatherv(mine.data(), static_cast<int>(mine.size()), type, all.values.data(), counts.data(),
                           starts.data(), type, comm),
            "MPI_Allgatherv");
  return all;
}

}  // namespace

std::string mpi_error_text(int code) {
  std::string text(MPI_MAX_ERROR_STRING, '\0');
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) return fmt::format("error code {}", code);
  text.resize(static_cast<std::size_t>(length));
  return text;
}

MPI_Op mpi_op(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return MPI_SUM;
    case ReduceOp::kMax:
      return MPI_MAX;
    case ReduceOp::kMin:
      return MPI_MIN;
  }
  throw InternalError("unknown reduction {}", static_cast<int>(op));
}

MpiEnvironment::MpiEnvironment() {
  int provided = 0;
  check_mpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
  // The default is to end the job inside MPI; errors are to come back and be named.
  check_mpi(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  if (provided < MPI_THREAD_FUNNELED) {
    throw UserError(
        "MPI_Init_thread: this MPI library gives no support for programs with threads; use another");
  }
}

MpiEnvironment::~MpiEnvironment() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (size == 1 || std::uncaught_exceptions() == 0) MPI_Finalize();
}

void MpiEnvironment::abort(int exit_code) const {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::terminate();  // not reached: MPI_Abort does not return
}

ProcessGroup::ProcessGroup(std::shared_ptr<const Handle> handle, std::shared_ptr<Heartbeat> heartbeat)
    : handle_(std::move(handle)), heartbeat_(std::move(heartbeat)) {
  check_mpi(MPI_Comm_rank(handle_->get(), &rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(handle_->get(), &size_), "MPI_Comm_size");
}

ProcessGroup ProcessGroup::world() {
  return ProcessGroup(std::make_shared<const Handle>(MPI_COMM_WORLD, false), std::make_shared<Heartbeat>());
}

ProcessGroup ProcessGroup::split(int color, int key) const {
  const Heartbeat::Wait wait(*heartbeat_, "split");
  MPI_Comm part = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split(handle_->get(), color, key, &part), "MPI_Comm_split");
  return ProcessGroup(std::make_shared<const Handle>(part, true), heartbeat_);
}

ProcessGroup ProcessGroup::split_by_host() const {
  const Heartbeat::Wait wait(*heartbeat_, "split");
  MPI_Comm part = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split_type(handle_->get(), MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &part),
            "MPI_Comm_split_type");
  return ProcessGroup(std::make_shared<const Handle>(part, true), heartbeat_);
}

void ProcessGroup::barrier() const {
  const Heartbeat::Wait wait(*heartbeat_, "barrier");
  check_mpi(MPI_Barrier(handle_->get()), "MPI_Barrier");
}

void ProcessGroup::all_reduce(std::span<double> values, ReduceOp op) const {
  const Heartbeat::Wait wait(*heartbeat_, "all_reduce");
  reduce_in_place(values, MPI_DOUBLE, op, handle_->get());
}

void ProcessGroup::all_reduce(std::span<std::uint64_t> values, ReduceOp op) const {
  const Heartbeat::Wait wait(*heartbeat_, "all_reduce");
  reduce_in_place(values, MPI_UINT64_T, op, handle_->get());
}

std::vector<std::string> ProcessGroup::all_gather(const std::string& text) const {
  const Heartbeat::Wait wait(*heartbeat_, "all_gather");
  const auto all = gather<char>(text, MPI_CHAR, handle_->get(), size_);
  std::vector<std::string> texts;
  auto next = all.values.begin();
  for (const std::uint64_t count : all.counts) {
    const auto end = next + static_cast<std::ptrdiff_t>(count);
    texts.emplace_back(next, end);
    next = end;
  }
  return texts;
}

std::vector<std::vector<std::uint64_t>> ProcessGroup::all_gather(
    const std::vector<std::uint64_t>& values) const {
  const Heartbeat::Wait wait(*heartbeat_, "all_gather");
  const auto all = gather<std::uint64_t>(values, MPI_UINT64_T, handle_->get(), size_);
  std::vector<std::vector<std::uint64_t>> lists;
  auto next = all.values.begin();
  for (const std::uint64_t count : all.counts) {
    const auto end = next + static_cast<std::ptrdiff_t>(count);
    lists.emplace_back(next, end);
    next = end;
  }
  return lists;
}

void ProcessGroup::all_to_all(const std::byte* send, std::span<const std::uint64_t> send_bytes,
                              std::byte* receive, std::span<const std::uint64_t> receive_bytes) const {
  const Heartbeat::Wait wait(*heartbeat_, "all_to_all");
  struct Counts {
    std::vector<int> counts, begins;
  };
  const auto counts_of = [](std::span<const std::uint64_t> bytes) {
    Counts result;
    std::uint64_t begin = 0;
    for (const std::uint64_t count : bytes) {
      result.counts.push_back(narrow<int>(count));
      result.begins.push_back(narrow<int>(begin));
      begin += count;
    }
    return result;
  };
  const Counts out = counts_of(send_bytes);
  const Counts in = counts_of(receive_bytes);
  check_mpi(MPI_Alltoallv(send, out.counts.data(), out.begins.data(), MPI_BYTE, receive, in.counts.data(),
                          in.begins.data(), MPI_BYTE, handle_->get()),
            "MPI_Alltoallv");
}

std::string ProcessGroup::broadcast(const std::string& text, int root) const {
  const Heartbeat::Wait wait(*heartbeat_, "broadcast");
  std::uint64_t length = text.size();
  check_mpi(MPI_Bcast(&length, 1, MPI_UINT64_T, root, handle_->get()), "MPI_Bcast");
  std::string result = rank_ == root ? text : std::string(length, '\0');
  for (std::size_t begin = 0; begin < length; begin += kMpiChunk) {
    const std::size_t count = std::min(kMpiChunk, result.size() - begin);
    check_mpi(MPI_Bcast(result.data() + begin, static_cast<int>(count), MPI_CHAR, root, handle_->get()),
              "MPI_Bcast");
  }
  return result;
}

double ProcessGroup::broadcast(double number, int root) const {
  const Heartbeat::Wait wait(*heartbeat_, "broadcast");
  check_mpi(MPI_Bcast(&number, 1, MPI_DOUBLE, root, handle_->get()), "MPI_Bcast");
  return number;
}

void ProcessGroup::raise(const std::string& failure) {
  if (failure.empty()) return;
  const auto raise_as = [&failure]<class E>(std::type_identity<E>) {
    E error("{}", failure.substr(1));
    error.set_on_every_rank();
    throw error;
  };
  if (failure[0] == kUserTag) raise_as(std::type_identity<UserError>());
  if (failure[0] == kSystemTag) raise_as(std::type_identity<SystemError>());
  raise_as(std::type_identity<InternalError>());
}

void ProcessGroup::raise_first(const std::vector<std::string>& failures) {
  for (std::size_t rank = 0; rank < failures.size(); ++rank) {
    if (failures[rank].empty()) continue;
    const bool everywhere = std::all_of(failures.begin(), failures.end(), [&](const std::string& failure) {
      return failure == failures[rank];
    });
    raise(everywhere ? failures[rank]
                     : fmt::format("{}on rank {}: {}", failures[rank][0], rank, failures[rank].substr(1)));
  }
}

std::string describe_current_exception() {
  try {
    rethrow_as_error();
  } catch (const UserError& error) {
    return kUserTag + std::string(error.what());
  } catch (const InternalError& error) {
    return kInternalTag + std::string(error.what());
  } catch (const Error& error) {
    return kSystemTag + std::string(error.what());
  }
}

}  // namespace regroup
