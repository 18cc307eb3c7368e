#include "kernels/base/error.h"

#include <algorithm>
#include <cerrno>
#include <new>
#include <numeric>
#include <system_error>

namespace regroup {
namespace {

std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substitution = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitution});
    }
  }
  return row[b.size()];
}

}  // namespace

bool needs_a_person(int error_code) {
  switch (error_code) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EROFS:
    case EACCES:
    case EPERM:
    case ENOENT:
    case EEXIST:
    case ENOTDIR:
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
    case EMFILE:
    case ENOMEM:
    case ENODEV:
    case ENOLCK:
    case ENOSYS:
    case EOPNOTSUPP:
      return true;
    default:
      return false;
  }
}

void rethrow_as_error() {
  try {
    throw;
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw UserError(
        "this host has no memory left for the job: give it more, or a smaller --micro-batch, a larger "
        "--tensor-parallel or fewer ranks a host");
  } catch (const std::system_error& error) {
    const bool of_the_system = error.code().category() == std::generic_category() ||
                               error.code().category() == std::system_category();
    if (of_the_system && needs_a_person(error.code().value())) throw UserError("{}", error.what());
    throw SystemError("{}", error.what());
  } catch (const std::exception& error) {
    throw SystemError("{}", error.what());
  } catch (...) {
    throw InternalError("an exception of unknown type");
  }
}

std::string did_you_mean(const std::string& word, const std::vector<std::string>& candidates) {
  const std::string* best = nullptr;
  std::size_t best_distance = word.size() / 2 + 1;
  for (const std::string& candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = &candidate;
    }
  }
  return best == nullptr ? "" : fmt::format(" (did you mean '{}'?)", *best);
}

}  // namespace regroup
