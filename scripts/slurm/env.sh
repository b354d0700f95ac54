# What differs from site to site; every job sources it. Edit this file, not the jobs.
# Account, partition and the like: uncomment here and pass them with `sbatch $ENGINE_SBATCH job.sbatch`.
# export ENGINE_SBATCH="--account=MY_ACCOUNT --partition=MY_PARTITION"

# module load python/3.12 cuda/13       # whatever the site calls them

# The checkout that holds .venv (made with `make env` on a login node).
export ENGINE_HOME=${ENGINE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# Fast scratch of the node; results are written to the paths given to the job, never only here.
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}

# One thread pool per task, as large as the task's share of the node.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export NUMBA_NUM_THREADS=$OMP_NUM_THREADS
export MKL_NUM_THREADS=$OMP_NUM_THREADS

# A virtual environment elsewhere: export VENV=/path/to/it before submitting.
venv=${VENV:-.venv}
[[ $venv = /* ]] || venv=$ENGINE_HOME/$venv
# shellcheck disable=SC1090,SC1091
source "$venv/bin/activate"
