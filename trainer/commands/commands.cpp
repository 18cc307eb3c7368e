#include "trainer/commands/commands.h"

#include <cstdio>

#include "trainer/run/precision.h"
#include "trainer/version.h"

namespace regroup {

namespace {

void print_version(const Options& options) {
  const CpuLevel level = options.cpu_level.value_or(highest_cpu_level());
  fmt::print("regroup {}\nprocessor level {}, products in {}\n", kVersion, name_of(level),
             processor_multiplies_bfloat16(level) ? "bfloat16 and float32" : "float32");
}

}  // namespace

int run_command(const Options& asked, const ProcessGroup& world, const Log& log) {
  Options options = asked;
  resolve_precision(options, world);
  switch (options.mode) {
    case Mode::kHelp:
      if (world.rank() == 0) fmt::print("{}", help());
      return 0;
    case Mode::kVersion:
      if (world.rank() == 0) print_version(options);
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
