# What all jobs share; they source it and nothing else. Site settings are in env.sh.
#   once COMMAND         one process, on the first node
#   distributed COMMAND  one process per task of the allocation, on all its nodes; stops, saves and requeues on a signal
# Both put the container in front where there is one.
set -euo pipefail
# shellcheck disable=SC1090
source "${ENGINE_ENV:-${ENGINE_HOME:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/env.sh}"

# One thread pool per task, as large as the task's share of the node.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-${OMP_NUM_THREADS:-1}}
export NUMBA_NUM_THREADS=$OMP_NUM_THREADS MKL_NUM_THREADS=$OMP_NUM_THREADS
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # since SLURM 22.05 srun no longer takes the job's own

inside=()
if [ -n "${ENGINE_IMAGE:-}" ]; then
  inside=(apptainer exec ${ENGINE_BINDS:+--bind "$ENGINE_BINDS"})
  if nvidia-smi -L >/dev/null 2>&1; then inside+=(--nv); fi
  inside+=("$ENGINE_IMAGE")
else
  [[ $VENV = /* ]] || VENV=$ENGINE_HOME/$VENV
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi

once() { "${inside[@]}" "$@"; }

# Where the processes meet: the address, not the name, of the first node, because a name need not resolve.
master_address() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1
}

distributed() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then once "$@"; return; fi
  local asked="" code=0 child
  MASTER_ADDR=$(master_address)
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
  export MASTER_ADDR MASTER_PORT
  trap 'asked=yes' USR1 TERM
  # a task that dies takes the others with it after a minute, also where they would wait for it longer
  srun --wait=60 bash "$ENGINE_HOME/scripts/slurm/task.sh" "$@" &
  child=$!
  wait "$child" || code=$?
  # a trapped signal ends the first wait; sent again and again, because a task that is still importing ignores it
  while kill -0 "$child" 2>/dev/null; do
    if [ -n "$asked" ]; then kill -USR1 "$child" 2>/dev/null || true; fi
    sleep 2 & wait $! || true
    if ! kill -0 "$child" 2>/dev/null; then code=0; wait "$child" || code=$?; fi
  done
  if [ "$code" = 85 ]; then requeue; else return "$code"; fi
}

# Exit code 85 means: whole, unfinished, start me again.
requeue() {
  local state
  state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
  if [ "$ENGINE_REQUEUE" != yes ] || [[ $state != RUNNING ]]; then   # a job that its owner cancelled stays cancelled
    echo "stopped with its work saved (job state $state); submit the same job again to go on" >&2
    return 85
  fi
  echo "stopped with its work saved; requeueing job $SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID"
}
