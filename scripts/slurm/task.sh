#!/usr/bin/env bash
# One process of a distributed job; srun starts it once per task (job.sh). PyTorch finds its peers through the environment.
trap '' USR1   # until Python has a handler of its own the signal would kill it
# shellcheck disable=SC1091
source "$ENGINE_HOME/scripts/slurm/job.sh"
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
if [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[^,]+$ ]]; then LOCAL_RANK=0; fi   # the task sees its own GPU only, as number 0
if ! nvidia-smi -L >/dev/null 2>&1; then export ACCELERATE_USE_CPU=true; fi
# shellcheck disable=SC2154
exec "${inside[@]}" "$@"
