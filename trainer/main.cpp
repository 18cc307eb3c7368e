// The program: reads options, runs the command, turns an error into one line and an exit code.
#include <csignal>
#include <cstdio>
#include <optional>
#include <string>
#include <unistd.h>
#include <vector>

#include "trainer/commands/commands.h"
#include "trainer/exit_code.h"

namespace {

int run(const std::vector<std::string>& arguments, const regroup::MpiEnvironment& mpi) {
  const regroup::ProcessGroup world = regroup::ProcessGroup::world();
  const regroup::Log log(world.rank());
  // What every rank knows is told once, and all leave in good order; what only this rank knows ends the
  // others.
  const auto fail = [&](const regroup::Error& error, const std::string& message, int exit_code) {
    const bool everywhere = error.on_every_rank();
    if (!error.told() && (!everywhere || world.rank() == 0)) log.error("{}", message);
    if (!everywhere && world.size() > 1) mpi.abort(exit_code);
    return exit_code;
  };
  try {
    try {
      regroup::Options options;
      world.run_together([&] {
        options = regroup::parse_options(arguments);
        if (options.cpu_level) regroup::limit_cpu_level(*options.cpu_level);
      });
      return regroup::run_command(options, world, log);
    } catch (...) {
      regroup::rethrow_as_error();
    }
  } catch (const regroup::UserError& error) {
    return fail(error, error.what(), regroup::kUserFailure);
  } catch (const regroup::InternalError& error) {
    return fail(error, fmt::format("a bug: {}", error.what()), regroup::kFailure);
  } catch (const regroup::Error& error) {
    return fail(error, error.what(), regroup::kFailure);
  }
}

// OpenBLAS chooses its instructions before main() begins. So where a level is asked for, the program tells
// OpenBLAS and starts once more.
void restart_for_openblas(char** argv) {
  std::optional<regroup::CpuLevel> level;
  try {
    level = regroup::requested_cpu_level();
  } catch (const regroup::UserError&) {
    return;  // parse_options() tells the user
  }
  if (level && regroup::limit_openblas(*level)) execv("/proc/self/exe", argv);
}

}  // namespace

int main(int argc, char** argv) {
  restart_for_openblas(argv);
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is then a failed write, which is reported
  try {
    const regroup::MpiEnvironment mpi;
    return run(std::vector<std::string>(argv + 1, argv + argc), mpi);
  } catch (const regroup::UserError& error) {  // of MPI itself: there are no ranks yet
    std::fprintf(stderr, "%s\n", error.what());
    return regroup::kUserFailure;
  }
}
