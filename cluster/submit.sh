#!/usr/bin/env bash
# Submit a run of this checkout to a Ray cluster, and follow its output until it ends.
#   cluster/submit.sh NAME RECIPE [key.path=value ...]
# NAME is the name of the run; submitting the same name again resumes it. Other arguments go to t2idist.run.
# Environment: RAY_API_SERVER_ADDRESS (default http://127.0.0.1:8265, as with `ray dashboard` and `kubectl port-forward`),
# RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token), NO_WAIT=1 (return at once), RAY (the ray command;
# default: the checkout's .venv, else the one on PATH).
set -euo pipefail
if (($# < 2)) || [[ $1 == -* ]]; then
  echo "usage: cluster/submit.sh NAME RECIPE [key.path=value ...]" >&2
  exit 2
fi
name=$1
recipe=$2
shift 2
if [[ ! $name =~ ^[A-Za-z0-9_-][A-Za-z0-9._-]*$ ]]; then
  echo "error: NAME '$name'; allowed are letters, digits, '.', '_' and '-', not starting with a dot" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ray=${RAY:-$root/.venv/bin/ray}
if ! command -v "$ray" >/dev/null; then
  ray=ray
fi
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token} ]]; then
  echo "error: no token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file with the cluster's token" >&2
  exit 1
fi
options=(--address "$address" --submission-id "$name-$(date -u +%Y%m%dT%H%M%SZ)-$$" --metadata-json "{\"run\": \"$name\"}"
  --runtime-env "$root/cluster/runtime_env.yaml" --working-dir "$root")
if [[ -n ${NO_WAIT:-} ]]; then
  options+=(--no-wait)
fi
git=$(git -C "$root" describe --always --dirty=+ --abbrev=12 '--exclude=*' 2>/dev/null || echo unknown)
exec "$ray" job submit "${options[@]}" -- env "T2IDIST_GIT=$git" python -m t2idist.run "$recipe" "name=$name" \
  cluster.require_token=true "$@"
