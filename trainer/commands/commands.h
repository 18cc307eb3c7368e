// One function a mode of `trainer`. All are collective over the world and return the exit code.
#pragma once

#include "kernels/base/log.h"
#include "parallel/process_group.h"
#include "trainer/options.h"

namespace regroup {

int run_command(const Options& options, const ProcessGroup& world, const Log& log);

int train_tokenizer_command(const Options& options, const ProcessGroup& world, const Log& log);
int prepare_data_command(const Options& options, const ProcessGroup& world, const Log& log);
int train_command(const Options& options, const ProcessGroup& world,
                  const Log& log);  // --pretrain, --uptrain
int evaluate_command(const Options& options, const ProcessGroup& world, const Log& log);
int convert_command(const Options& options, const ProcessGroup& world, const Log& log);
int export_command(const Options& options, const ProcessGroup& world, const Log& log);
int report_command(const Options& options, const ProcessGroup& world, const Log& log);
int doctor_command(const Options& options, const ProcessGroup& world, const Log& log);

}  // namespace regroup
