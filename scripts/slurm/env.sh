# What differs from site to site. Edit this file (or point ENGINE_ENV at a copy of it), not the jobs: every job and
# pipeline.sh source it. Everything here may also be set before submitting.

# sbatch reads these names by itself; for a single `sbatch job.sbatch` source this file first.
# export SBATCH_ACCOUNT=my_account
# export SBATCH_PARTITION=my_partition

# What pipeline.sh gives its jobs beyond the #SBATCH lines in them. Training takes one task per GPU; on several nodes:
# ENGINE_TRAIN_RESOURCES="--nodes=4 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --mem=0 --time=24:00:00"
# ENGINE_FIT_RESOURCES="--cpus-per-task=8 --mem=32G"
# ENGINE_GENERATE_RESOURCES="--gpus-per-node=1 --time=02:00:00"
# ENGINE_AUDIT_RESOURCES="--mem=64G --time=08:00:00"

# module load python/3.12 cuda/13       # whatever the site calls them

# A container (scripts/slurm/engine.def); without one the environment $VENV is used.
# ENGINE_IMAGE=/path/to/engine.sif
# ENGINE_BINDS=/scratch,/project        # folders the container sees beside your home

# The checkout that holds .venv (made with `make env` on a login node), or VENV=/path/to/another one.
export ENGINE_HOME=${ENGINE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
export VENV=${VENV:-.venv}

# Fast disk of the node: training copies what it reads there, once per node, and reads it from there.
# ENGINE_SCRATCH=${SLURM_TMPDIR:-/local/scratch/$USER}
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}

# The network between nodes, where the first interface is the wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A training that was stopped with its work saved goes back into the queue by itself; "no": it ends with exit code 85.
export ENGINE_REQUEUE=${ENGINE_REQUEUE:-yes}
