#!/usr/bin/env bash
# Start Ray on a machine of aws.yaml or gcp.yaml: with a token, the dashboard on loopback, and fast health checks.
#   start_ray.sh head
#   start_ray.sh worker aws|gcp     RAY_HEAD_IP is the head's address; the node is drained on a notice of the cloud
set -euo pipefail
export PATH=$HOME/t2idist-venv/bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token RAY_USAGE_STATS_ENABLED=0
# a node that does not respond is declared dead after 3 x (2 s + 2 s)
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3
export RAY_JOB_STOP_WAIT_TIME_S=60 # of `ray job stop`: a run saves its state meanwhile
role=${1:-}
cloud=${2:-}
if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
  echo "error: $RAY_AUTH_TOKEN_PATH is missing; create it where \`ray up\` runs: ray get-auth-token --generate" >&2
  exit 1
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"
ulimit -S -n "$(ulimit -H -n)" # Ray opens many files
case $role in
  head)
    ray stop
    ray start --head --port=6379 --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 \
      --autoscaling-config="$HOME/ray_bootstrap_config.yaml"
    ;;
  worker)
    if [[ $cloud != aws && $cloud != gcp ]]; then
      echo "error: start_ray.sh worker '$cloud'; allowed are aws and gcp" >&2
      exit 2
    fi
    if [[ -s $HOME/spot_notice.pid ]]; then
      kill "$(cat "$HOME/spot_notice.pid")" 2>/dev/null || true
    fi
    ray stop
    ray start --address="${RAY_HEAD_IP:?"RAY_HEAD_IP is not set: ray up sets it"}:6379"
    nohup python -m t2idist.cli drain --watch "$cloud" >"$HOME/spot_notice.log" 2>&1 </dev/null &
    echo $! >"$HOME/spot_notice.pid"
    ;;
  *)
    echo "error: start_ray.sh '$role'; allowed are head and worker" >&2
    exit 2
    ;;
esac
