# What the batch scripts share. Sourced by bash.
# shellcheck shell=bash

# run_and_requeue ARGUMENT...
#
# Runs `trainer ARGUMENT...` on the job's ranks, one a task. The scheduler's USR1, which comes before the time
# limit, is passed on: the trainer saves at the next step and exits with 75, and the job is put back into the
# queue, where the same command resumes it. Exits with the trainer's code otherwise.
run_and_requeue() {
  export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
  local command=()
  if [[ "$(srun --mpi=list 2>&1)" == *pmix* ]]; then
    # --wait: a rank that is gone takes the others with it.
    command=(srun --mpi=pmix --cpu-bind=cores --cpus-per-task="$OMP_NUM_THREADS" --wait=60)
  else
    # A rank's threads need cores of their own: mpirun's default would give all of them one.
    command=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$OMP_NUM_THREADS" --bind-to core)
  fi
  "${command[@]}" "${TRAINER:-trainer}" "$@" &
  local child=$! code=0
  trap 'kill -USR1 "$child"' USR1
  wait "$child" || code=$?
  # A trapped signal ends `wait` early: wait for the job itself.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  if [[ $code -eq 75 ]]; then
    echo "Saved before the time limit; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
