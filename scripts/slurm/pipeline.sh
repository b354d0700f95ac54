#!/usr/bin/env bash
# Submit the whole chain, each stage after the one before it has ended well (afterok); prints "stage job-id" lines.
#   scripts/slurm/pipeline.sh imaging  CONFIG CSV        OUT N [SHARDS [SEED]]     prepare train generate finish audit
#   scripts/slurm/pipeline.sh genomics PANEL MAP SAMPLES OUT N [SHARDS [SEED]]     prepare fit   generate finish audit
# With ENGINE_TRANSFORMER=CONFIG the haplotype model is that transformer, trained like a scan model: prepare train generate ...
# Results, one folder each under OUT: cache or split, run, synthetic, audit; logs/ has what the jobs said. A stage that fails
# takes those behind it out of the queue. The audit's job fails (exit 3) unless the verdict is a pass.
set -euo pipefail
ENGINE_HOME=${ENGINE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export ENGINE_HOME
# shellcheck disable=SC1090
source "${ENGINE_ENV:-$ENGINE_HOME/scripts/slurm/env.sh}"
usage="usage: pipeline.sh imaging CONFIG CSV OUT N [SHARDS [SEED]] | genomics PANEL MAP SAMPLES OUT N [SHARDS [SEED]]"
modality=${1:?$usage}
case $modality in
  imaging) config=${2:?$usage} data=${3:?$usage}; shift 3 ;;
  genomics) panel=${2:?$usage} map=${3:?$usage} samples=${4:?$usage}; shift 4 ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
out=$(realpath -m "${1:?$usage}") n=${2:?$usage} shards=${3:-4} seed=${4:-0}
mkdir -p "$out/logs"
after=""

# submit STAGE "RESOURCES" JOB ARGUMENTS...: after the stage before it; remembers itself for the next one
submit() {
  local stage=$1 resources=$2 job=$3 id
  # shellcheck disable=SC2086
  id=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} --output="$out/logs/$stage-%j.log" \
    $resources "$ENGINE_HOME/scripts/slurm/$job.sbatch" "${@:4}")
  after=${id%%;*}
  echo "$stage $after"
}

if [ "$modality" = imaging ]; then
  submit prepare "${ENGINE_PREPARE_RESOURCES:-}" prepare_imaging "$config" "$data" "$out/cache"
  submit train "${ENGINE_TRAIN_RESOURCES:-}" train_imaging "$config" "$data" "$out/run" --cache "$out/cache"
  synthetic=$out/synthetic train=$out/run/train.csv holdout=$out/run/holdout.csv
else
  submit prepare "${ENGINE_PREPARE_RESOURCES:-}" prepare_genomics "$panel" "$samples" "$out/split" --seed "$seed"
  if [ -n "${ENGINE_TRANSFORMER:-}" ]; then
    submit train "${ENGINE_TRAIN_RESOURCES:-}" train_genomics "$ENGINE_TRANSFORMER" "$out/split/train.bcf" "$map" "$samples" "$out/run"
  else
    submit fit "${ENGINE_FIT_RESOURCES:-}" fit_genomics "$out/split/train.bcf" "$map" "$samples" "$out/run"
  fi
  synthetic=$out/synthetic.bcf train=$out/split/train.bcf holdout=$out/split/holdout.bcf
fi
submit generate "--array=0-$((shards - 1)) ${ENGINE_GENERATE_RESOURCES:-}" "generate_$modality" "$out/run" "$n" "$synthetic" "$seed"
submit finish "${ENGINE_FINISH_RESOURCES:-}" finish "$modality" "$synthetic" "$shards"
submit audit "${ENGINE_AUDIT_RESOURCES:-}" audit "$train" "$holdout" "$synthetic" "$out/audit" --seed "$seed"
