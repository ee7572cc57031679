#!/usr/bin/env bash
# Install t2idist on a fresh Linux machine, in ~/t2idist-venv; aws.yaml and gcp.yaml run this on every machine.
#   setup_machine.sh WHEEL [PACKAGE ...]     WHEEL with its extras "scores" and "serve", and further packages, at pinned versions
# A second run with the same arguments changes nothing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wheel=${1:?"usage: setup_machine.sh WHEEL [PACKAGE ...]"}
shift
if [[ ! -f $wheel ]]; then
  echo "error: $wheel does not exist; build it with: python -m pip wheel --no-deps --wheel-dir dist ." >&2
  exit 1
fi
venv=$HOME/t2idist-venv
uv=$HOME/.local/bin/uv
if [[ ! -x $uv ]]; then
  curl --proto '=https' --tlsv1.2 --fail --silent --show-error --location https://astral.sh/uv/0.13.8/install.sh |
    env UV_NO_MODIFY_PATH=1 sh
fi
if [[ ! -x $venv/bin/python ]]; then
  "$uv" venv --quiet --python 3.11 --seed "$venv"
fi
"$uv" pip install --quiet --python "$venv/bin/python" --constraint "$here/constraints.txt" "${wheel}[scores,serve]" "$@"
"$venv/bin/python" -c 'import ray, t2idist; print(f"t2idist {t2idist.__version__}, Ray {ray.__version__}")'
# a cloud may install the driver while the machine starts; Ray would count a GPU that nothing can use yet
if command -v lspci >/dev/null && lspci | grep -Eqi '(3d|vga).*nvidia'; then
  deadline=$((SECONDS + ${T2IDIST_DRIVER_SECONDS:-900}))
  until nvidia-smi -L >/dev/null 2>&1; do
    if ((SECONDS >= deadline)); then
      echo "error: this machine has an NVIDIA GPU and no driver that works; nvidia-smi -L shows why" >&2
      exit 1
    fi
    sleep 5
  done
  "$venv/bin/python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit(
    f"error: torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}; nvidia-smi shows the one here")'
fi
# for login shells and `ray exec`
for line in "export PATH=\$HOME/t2idist-venv/bin:\$PATH" "export RAY_AUTH_MODE=token"; do
  grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null || printf '%s\n' "$line" >>"$HOME/.bashrc"
done
