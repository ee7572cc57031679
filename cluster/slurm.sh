#!/usr/bin/env bash
# Train on the nodes of one Slurm job:
#   sbatch --nodes=2 cluster/slurm.sh NAME RECIPE storage=URL [key.path=value ...]
# Pass partition, account, time and GPUs per node to sbatch; the values below are defaults. Every node starts Ray; the first
# one also runs the driver. cluster.workers defaults to all GPUs of the job.
#
# Before its time limit (or before a preemption, if the cluster has PreemptParameters=send_user_signal) the job receives
# USR1: every node is drained, so that the run saves its state, and the job is requeued and resumes. If a node fails, the
# run continues without it, as far as cluster.workers allows.
#
# Environment: T2IDIST_VENV (a virtual environment with t2idist that all nodes see; default: the checkout's .venv),
# T2IDIST_IFNAME (the nodes' network interface, if the first one is wrong).
#SBATCH --job-name=t2idist
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
if (($# < 2)); then
  echo "usage: sbatch --nodes=N cluster/slurm.sh NAME RECIPE storage=URL [key.path=value ...]" >&2
  exit 2
fi
: "${SLURM_JOB_ID:?"run this script with sbatch"}"
name=$1
recipe=$2
shift 2
root=${SLURM_SUBMIT_DIR:?}
if [[ ! -d $root/t2idist ]]; then
  echo "error: there is no folder t2idist in $root; run sbatch in the root of the checkout" >&2
  exit 2
fi
cd "$root"
venv=${T2IDIST_VENV:-$root/.venv}
if [[ ! -x $venv/bin/ray ]]; then
  echo "error: $venv/bin/ray does not exist; set T2IDIST_VENV to a virtual environment with t2idist that all nodes see" >&2
  exit 2
fi
export PATH=$venv/bin:$PATH

# one Ray cluster per job, with its own token and port, and files on the nodes' local disks
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
if [[ -n ${T2IDIST_IFNAME:-} ]]; then
  export GLOO_SOCKET_IFNAME=$T2IDIST_IFNAME NCCL_SOCKET_IFNAME=$T2IDIST_IFNAME
fi
nodes=${SLURM_JOB_NUM_NODES:?}
gpus_per_node=${SLURM_GPUS_PER_TASK:-${SLURM_GPUS_ON_NODE:-0}}
gpus_per_node=${gpus_per_node##*:} # "a100:4" is 4
gpus=$((nodes * gpus_per_node))
mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
if [[ -n ${T2IDIST_IFNAME:-} ]]; then
  query=(ip -4 -brief address show dev "$T2IDIST_IFNAME") # eth0 UP 10.1.2.3/24
  read -r _ _ address _ < <(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${query[@]}")
else
  read -r address _ < <(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname --all-ip-addresses)
fi
address=${address%/*}
port=$((20000 + SLURM_JOB_ID % 20000))
files=/tmp/ray-$SLURM_JOB_ID
cpus=${SLURM_CPUS_PER_TASK:-1}

if ((gpus > 0)); then
  scale=("cluster.workers=[1,$gpus]" cluster.gpus_per_worker=1 "cluster.cpus_per_worker=$((cpus / gpus_per_node))")
else
  scale=("cluster.workers=[1,$nodes]" cluster.gpus_per_worker=0 "cluster.cpus_per_worker=$cpus")
fi

export SRUN_CPUS_PER_TASK=$cpus # srun does not inherit it from sbatch

requeued=
# shellcheck disable=SC2329 # the trap calls it
save_and_requeue() {
  echo "$(date -u +%FT%TZ) the nodes are about to be shut down: saving"
  srun --overlap --ntasks="$nodes" --ntasks-per-node=1 --no-kill python -m t2idist.cli drain --seconds 60 || true
  requeued=yes
  scontrol requeue "$SLURM_JOB_ID"
}
trap save_and_requeue USR1

srun --ntasks="$nodes" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 \
  ray symmetric-run --address "$address:$port" --min-nodes "$nodes" \
  --num-cpus="$cpus" --num-gpus="$gpus_per_node" --temp-dir="$files" --disable-usage-stats \
  -- python -m t2idist.run "$recipe" "name=$name" cluster.require_token=true "${scale[@]}" "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the first wait, not the step
  status=0
  wait "$step" || status=$?
done
if [[ -n $requeued ]]; then
  exit 0
fi
srun --ntasks="$nodes" --ntasks-per-node=1 --no-kill rm -rf "$files" || true
exit "$status"
