#!/usr/bin/env bash
# Create or update the virtual environment: scripts/make_env.sh EXTRAS, e.g. "demo,test". Run through `make`.
# Takes a CUDA build of PyTorch where nvidia-smi sees a GPU and a CPU build everywhere else, so that a CPU machine never
# downloads CUDA packages. Does nothing when the environment already fits pyproject.toml and constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-demo}
venv=${VENV:-.venv}

say() { echo "[env] $*" >&2; }
fail() { say "$*"; exit 2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

if nvidia-smi -L >/dev/null 2>&1; then build=cuda; else build=cpu; fi
fingerprint() { { cat pyproject.toml constraints.txt scripts/make_env.sh; echo "$extras $build $PWD"; } | sha256sum | cut -c1-16; }
stamp="$venv/.engine-$(fingerprint)"
if [ -f "$stamp" ]; then
  say "$venv is up to date ($build build of PyTorch, extras: $extras)"
  exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  [ -n "$python" ] || fail "expected Python 3.11, 3.12 or 3.13, found none; try: apt-get install python3, or PYTHON=/path/to/python3 make ..."
  say "creating $venv with $("$python" --version) at $python"
  if ! "$python" -m venv "$venv" 2>/dev/null; then
    rm -rf "$venv"
    # Debian and Ubuntu ship the venv module as a package of its own
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      say "installing the venv module (python3-venv) with apt-get"
      apt-get update -qq
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
      "$python" -m venv "$venv" || fail "cannot create a virtual environment with $python"
    else
      fail "cannot create a virtual environment with $python; try: sudo apt-get install python3-venv"
    fi
  fi
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
say "installing (a few minutes the first time): $build build of PyTorch, extras: $extras"
pip install --quiet --upgrade 'pip>=24.1'
version=$(sed -n 's/^torch==//p' constraints.txt)
if [ "$build" = cuda ] || [ "$(uname -s)" != Linux ]; then
  pip install --quiet -c constraints.txt torch
else
  have=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
  # the local version label "+cpu" cannot match a CUDA build, whatever index pip is set up with
  [ "$have" = "$version+cpu" ] ||
    pip install --quiet -c constraints.txt "torch==$version+cpu" 2>/dev/null ||
    pip install --quiet -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" ||
    fail "no CPU build of torch $version could be installed; try: check the network, or pip install torch==$version by hand into $venv"
fi
pip install --quiet -c constraints.txt -e ".[$extras]"
if [ "$build" = cpu ] && pip list 2>/dev/null | grep -qiE '^nvidia-|^cuda-'; then
  fail "CUDA packages were pulled onto a machine without a GPU; this is a defect of constraints.txt, please report it"
fi
rm -f "$venv"/.engine-*
touch "$stamp"
say "ready: $("$venv/bin/python" --version), torch $("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')"
