#!/usr/bin/env bash
# Programs that some tests call to check our output (never needed to use the engine). As root on Debian or Ubuntu the
# missing ones are installed; elsewhere they are named and the tests that need them are skipped with a reason.
set -euo pipefail
PATH=$PATH:/usr/sbin
missing=()
for pair in bcftools:bcftools plink2:plink2 chromium:chromium dcm2niix:dcm2niix dciodvfy:dicom3tools shellcheck:shellcheck slurmctld:slurm-wlm munged:munge; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
if [ ${#missing[@]} = 0 ]; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "[tools] installing ${missing[*]} with apt-get" >&2
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1; then
    echo "[tools] apt-get could not install ${missing[*]}; tests that need them are skipped" >&2
  fi
else
  echo "[tools] not found: ${missing[*]}; tests that need them are skipped (sudo apt-get install ${missing[*]})" >&2
fi
