// How a job ended, for the shell or the batch script that started it.
#pragma once

namespace regroup {

enum ExitCode : int {
  kDone = 0,
  kFailure = 1,      // the system or a library failed, or a bug: the same command may succeed on another node
  kUserFailure = 2,  // an option, a file, what the machine lacks (memory, a device, room on a disk): a person
                     // has to put it right
  kStopped = 75,     // a signal or the stop file; everything is saved: the same command resumes
  kHung = 76,        // the watchdog ended a job that had come to a halt: the same command resumes
  kNoProgress = 77,  // --restart-budget starts in a row came to no new checkpoint: a person has to look. A
                     // start that ended with kUserFailure before its first step is none of them
};

}  // namespace regroup
