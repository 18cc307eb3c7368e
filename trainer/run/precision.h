// What --precision auto is: a matter of the devices that the ranks have.
#pragma once

#include "parallel/process_group.h"
#include "trainer/options.h"

namespace regroup {

// Replaces `auto` by bf16 where the devices of all ranks multiply bfloat16 in hardware (GPUs, AVX-512 BF16,
// AMX), by fp32 elsewhere. Collective.
void resolve_precision(Options& options, const ProcessGroup& world);

// A run that was begun in one precision goes on in it, unless the user asks for another.
void keep_precision(Options& options, const std::string& begun);

}  // namespace regroup
