# What the batch scripts share. Sourced by bash, from a batch script's first node.
# shellcheck shell=bash

# A launcher that fails before the trainer counts its starts (--restart-budget) must not be put back for ever either:
# after this many failures in a row, each within so many seconds of its start, the job ends.
most_failures=5
quick_seconds=300

say() { echo "[$(date +%T)] [job $SLURM_JOB_ID] $*"; }

# stop CODE WORD...
stop() {
  local code=$1
  shift
  say "$@" >&2
  exit "$code"
}

# Sets `ranks`, `tasks` and `gpus` (of a node), `visible` and `cores` (of the first node: the processors that this script
# may use, and the cores that they make), `cpus` and `threads` (of a rank: Slurm's CPUs, which may be half cores, and
# the threads that have a core each).
look_at_the_job() {
  tasks="${SLURM_NTASKS_PER_NODE:-${SLURM_TASKS_PER_NODE%%[(,]*}}"
  ranks="${SLURM_NTASKS:-$((tasks * SLURM_JOB_NUM_NODES))}"
  gpus="${SLURM_GPUS_ON_NODE:-0}"
  local threads_of_a_core
  threads_of_a_core="$(LC_ALL=C lscpu | sed -n 's/^Thread(s) per core: *//p')"
  visible="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"
  cores=$((visible / ${threads_of_a_core:-1}))
  cpus="${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks))}"
  threads=$((cpus * tasks <= cores ? cpus : cores / tasks))
  cpus=$((cpus < 1 ? 1 : cpus))
  threads=$((threads < 1 ? 1 : threads))
}

# Sets DEVICE where the user has not.
choose_device() {
  if [[ -n "${DEVICE:-}" ]]; then return; fi
  if ((gpus == 0)); then stop 2 "This job has no GPUs: submit it with --gpus-per-node=8, or with DEVICE=cpu"; fi
  if ((tasks < gpus)); then
    stop 2 "Of $gpus GPUs a node $tasks would be used: submit the job with --ntasks-per-node=$gpus, or set DEVICE=cuda"
  fi
  DEVICE=cuda
}

# Sets `launch`, the words before the program. LAUNCHER chooses, LAUNCHER_FLAGS adds to them.
choose_launcher() {
  local launcher="${LAUNCHER:-}"
  if [[ -z "$launcher" ]]; then
    launcher=mpirun
    if [[ "$(srun --mpi=list 2>&1)" == *pmix* ]]; then launcher=srun; fi
  fi
  export OMP_NUM_THREADS="$threads"
  case "$launcher" in
    srun)
      # block:block: a node's ranks fill one socket after the other, as its GPUs do, of which rank r takes number r.
      # Once a rank is gone the others have 30 seconds to follow. --kill-on-bad-exit=1 would be faster where a rank
      # was killed, but kills ranks that are about to exit, and their codes 2, 75 and 77 with them.
      launch=(srun --mpi=pmix --export=ALL --ntasks="$ranks" --cpus-per-task="$cpus" --cpu-bind=cores
        --distribution=block:block --kill-on-bad-exit=0 --wait=30)
      ;;
    mpirun)
      # By default mpirun binds a rank with all its threads to one core. A core for each thread, where the cores that
      # it sees are this job's own; else it would take those of another job.
      launch=(mpirun -n "$ranks" --rank-by slot -x OMP_NUM_THREADS)
      if ((visible <= SLURM_CPUS_ON_NODE && tasks * threads <= cores && tasks * SLURM_JOB_NUM_NODES == ranks)); then
        launch+=(--map-by "ppr:$tasks:node:PE=$threads" --bind-to core)
      else
        launch+=(--bind-to none)
      fi
      ;;
    *) stop 2 "LAUNCHER is '$launcher': srun, mpirun, or unset for the one that suits" ;;
  esac
  local flags
  read -ra flags <<<"${LAUNCHER_FLAGS:-}"
  launch+=("${flags[@]}")
}

# Where a node has failed under a step, slurmd keeps that step's socket, and refuses PMIx to a step of the same number
# when the job comes back to the node. So each of ten starts in a row takes another one, by as many empty steps before.
take_step_number() {
  local step
  for ((step = 0; step < ${SLURM_RESTART_COUNT:-0} % 10; ++step)); do
    srun --mpi=none --nodes=1 --ntasks=1 true || true
  done
}

# What Slurm makes of this job now: "RUNNING None" in a job that nobody has ended.
job_state() { squeue --noheader --jobs "$SLURM_JOB_ID" --format '%T %r' 2>/dev/null || true; }

# requeue CODE: puts this job back into the queue and exits.
requeue() {
  local wait
  say "Putting the job back into the queue"
  for wait in 0 5 30; do
    sleep "$wait"
    if scontrol requeue "$SLURM_JOB_ID"; then exit "$1"; fi
  done
  stop "$1" "COULD NOT BE PUT BACK INTO THE QUEUE: submit the job again, the same command resumes"
}

# Counts failures soon after the start in a file beside the log, which is removed when a start gets on.
requeue_after_failure() {
  local count
  if ((SECONDS >= quick_seconds)); then rm -f "$failures"; fi
  echo "$(date '+%F %T'): exit code $1 after $SECONDS s on $SLURM_JOB_NODELIST" >>"$failures" || true
  count="$(wc -l <"$failures" || echo 0)"
  if ((count >= most_failures)); then
    stop "$1" "Not put back into the queue: $count failures in a row, listed in $failures; look above, submit again"
  fi
  requeue "$1"
}

# end CODE: what the exit code of the trainer (trainer/exit_code.h) or its launcher means for the job.
end() {
  local failures="regroup-$SLURM_JOB_ID.failures" state
  say "Exit code $1 after $SECONDS s"
  case "$1" in
    0 | 75) rm -f "$failures" ;;
    2 | 126 | 127) stop "$1" "Not put back into the queue: put right what is said above" ;;
    77) stop 77 "Not put back into the queue: start after start without a new checkpoint; look above" ;;
  esac
  if [[ "$1" -eq 0 || -n "$requeued" ]]; then exit "$1"; fi
  state="$(job_state)"
  case "$state" in
    "" | RUNNING* | *TimeLimit*) ;;
    # scancel; or a failed node or preemption, where Slurm itself puts the job back.
    *) stop "$1" "Slurm is ending this job ($state): not put back into the queue from here" ;;
  esac
  if [[ "$1" -eq 75 ]]; then requeue 75; fi
  # 1, 76, and whatever the launcher says of ranks that died.
  requeue_after_failure "$1"
}

# Slurm's USR1 before the time limit, or a SIGTERM to the script alone: the ranks get SIGUSR1, as mpirun would kill
# them on SIGTERM, and save at the next step.
pass_on() {
  woken=1
  say "Got SIG$1: the ranks are told to save and stop"
  if [[ -n "$child" ]]; then kill -USR1 "$child" 2>/dev/null || true; fi
  # The limit has come before the ranks were done, and SIGKILL is seconds away.
  if [[ "$1" == TERM && "$(job_state)" == *TimeLimit* ]]; then
    if scontrol requeue "$SLURM_JOB_ID"; then requeued=1; fi
  fi
}

# run_and_requeue ARGUMENT...
#
# Runs `trainer ARGUMENT...` on the job's ranks, one a task, and puts the job back into the queue where the same
# command resumes it. Exits with the trainer's code. After look_at_the_job().
run_and_requeue() {
  local trainer="${TRAINER:-trainer}" code woken='' child='' requeued=''
  if ! command -v "$trainer" >/dev/null; then stop 2 "There is no program $trainer: set TRAINER to its path"; fi
  choose_launcher
  say "Start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $ranks ranks of $threads threads"
  say "${launch[*]} $trainer $*"
  if [[ "$1" != --prepare-data ]]; then  # which has nothing to save
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
  fi
  if [[ "${launch[0]}" == srun ]]; then take_step_number; fi
  "${launch[@]}" "$trainer" "$@" &
  child=$!
  if [[ -n "$woken" ]]; then kill -USR1 "$child"; fi
  while
    woken=''
    code=0
    wait "$child" || code=$?
    [[ -n "$woken" ]]  # a trapped signal ends `wait` early
  do :; done
  end "$code"
}
