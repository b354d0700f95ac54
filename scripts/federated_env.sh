#!/usr/bin/env bash
# The environment of the Flower example: Flower and its libraries, and behind them the engine's own environment.
# Flower needs an older protobuf and typer than the engine's tests have, so it cannot live in .venv; here its own come first.
# Usage: scripts/federated_env.sh [ENV]   (default .venv-federated; VENV names the engine's environment, default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
env=${1:-.venv-federated}
base=$(cd "${VENV:-.venv}" && pwd)
flower="flwr==1.42.0"
if [ -x "$env/bin/flower-superlink" ] && [ "$(cat "$env/made-of" 2>/dev/null)" = "$flower $base" ]; then
  exit 0
fi
echo "[federated] creating $env" >&2
rm -rf "$env"
"$base/bin/python" -m venv "$env"
"$env/bin/python" -m pip install --quiet --disable-pip-version-check "$flower" 2>"$env/pip.log" || { cat "$env/pip.log" >&2; exit 1; }
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' >"$site/engine.pth"
pwd >>"$site/engine.pth"
echo "$flower $base" >"$env/made-of"
