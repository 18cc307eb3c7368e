#include "trainer/commands/commands.h"

#include <cstdio>

#include "trainer/version.h"

namespace regroup {

int run_command(const Options& options, const ProcessGroup& world, const Log& log) {
  switch (options.mode) {
    case Mode::kHelp:
      if (world.rank() == 0) fmt::print("{}", help());
      return 0;
    case Mode::kVersion:
      if (world.rank() == 0) fmt::print("regroup {}\n", kVersion);
      return 0;
    case Mode::kTrainTokenizer:
      return train_tokenizer_command(options, world, log);
    case Mode::kPrepareData:
      return prepare_data_command(options, world, log);
    case Mode::kPretrain:
    case Mode::kUptrain:
      return train_command(options, world, log);
    case Mode::kEvaluate:
      return evaluate_command(options, world, log);
    case Mode::kConvert:
      return convert_command(options, world, log);
    case Mode::kExport:
      return export_command(options, world, log);
    case Mode::kReport:
      return report_command(options, world, log);
    case Mode::kDoctor:
      return doctor_command(options, world, log);
  }
  throw InternalError("unknown mode");
}

}  // namespace regroup
