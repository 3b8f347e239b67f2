#!/bin/bash
# bigint8 as a Slurm job: a Ray cluster over the job's nodes, for the time of the job, with a token of its own.
#
#   sbatch --nodes=2 --gpus-per-node=4 launch/slurm.sh --model /shared/opt-66b --prompt "Once upon a time" --json out.json
#
# Before the script stand options of sbatch, which win over those below; after it, arguments of `bigint8 launch`. The
# folder in which sbatch is called, the model's, and the virtual environment that is active there must be readable
# under the same paths on all nodes. The log is bigint8-JOB.log in that folder; the exit code is that of the command.
#
#SBATCH --job-name=bigint8
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=bigint8-%j.log
#SBATCH --signal=B:TERM@60
#
# In the environment: BIGINT8_HEAD_IP, the first node's address in the network that the nodes shall use (by default that
# of its default route); BIGINT8_START_SECONDS, how long the nodes may take to start (300).
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -eq 0 ]; then
    echo "usage: sbatch [--nodes=N] [--gpus-per-node=N] $0 --model NAME_OR_PATH [ARGUMENTS OF bigint8 launch]..." >&2
    exit 2
fi

python -c 'import bigint8, ray' || {
    echo "error: the python here has no bigint8: activate its virtual environment before sbatch" >&2
    exit 1
}

# However the job ends, nothing stays behind; if it ends badly, the log has what Ray said last.
folder='' nodes='' command=''
end() {
    local code=$?
    trap - EXIT
    trap '' TERM INT
    if [ -n "$command" ]; then
        kill -TERM "$command" 2>/dev/null || true
        for _ in {1..10}; do ! kill -0 "$command" 2>/dev/null || sleep 1; done
        kill -KILL "$command" 2>/dev/null || true # Slurm itself waits for 30 s
        wait "$command" || true
    fi
    [ $code -eq 0 ] || [ -z "$folder" ] || tail -n 20 "$folder"/node-*.log 2>/dev/null || true
    if [ -n "$nodes" ]; then # srun itself would hand on no SIGTERM: it kills
        scancel --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null || true
        wait "$nodes" || true
    fi
    [ -z "$folder" ] || rm -rf "$folder"
    exit $code
}
trap end EXIT
trap 'exit 143' TERM INT

# What the nodes share. mktemp lets nobody else read the folder, and so the token.
folder=$(mktemp -d "$PWD/.bigint8-$SLURM_JOB_ID-XXXXXX")
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$folder/token"
export folder PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # Ray ends last: nothing is left to wait for
ip=${BIGINT8_HEAD_IP:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
export ip address=$ip:$((20000 + SLURM_JOB_ID % 10000)) # other jobs may have clusters on the same nodes

# Runs on each node until it gets SIGTERM. Ray's own files are in a folder of this job.
node() {
    local files=/tmp/bigint8-ray-$SLURM_JOB_ID code=0 ended='' ray
    local options=(--block --log-color=false --temp-dir="$files" --dashboard-agent-listen-port=0)
    options+=(--num-cpus="${SLURM_CPUS_PER_TASK:-$(nproc)}")
    if [ "$SLURM_PROCID" = 0 ]; then
        options+=(--head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false)
    else
        options+=(--address="$address")
        until ray health-check --address "$address" >/dev/null 2>&1; do sleep 1; done
    fi
    ulimit -n "$(ulimit -Hn)"
    ray start "${options[@]}" >"$folder/node-$SLURM_PROCID.log" 2>&1 &
    ray=$!
    trap 'ended=yes; kill -TERM $ray' TERM INT
    wait $ray || code=$?
    if [ -n "$ended" ]; then # that was the signal; now Ray
        wait $ray || true
        code=0
    fi
    rm -rf "$files"
    return $code
}

wait_for_nodes='
import contextlib, os, sys, time
import ray
wanted, until, there = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
while there < wanted:
    if time.monotonic() > until:
        sys.exit(f"error: {there} of {wanted} nodes are there after {sys.argv[2]} s (BIGINT8_START_SECONDS)")
    time.sleep(1)
    with contextlib.suppress(ConnectionError, RuntimeError, ray.exceptions.RayError):
        if not ray.is_initialized():
            ray.init(address=os.environ["address"], log_to_driver=False, logging_level="ERROR")
        there = sum(node["Alive"] for node in ray.nodes())
'

# Runs a command as long as all nodes are there.
run() {
    local code=0
    "$@" &
    command=$!
    wait -n "$command" "$nodes" || code=$?
    if ! kill -0 "$nodes" 2>/dev/null; then
        echo "error: Ray has ended on a node" >&2
        exit 1
    fi
    command=''
    [ $code -eq 0 ] || exit $code
}

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c "$(declare -f node); node" &
nodes=$!

echo "job $SLURM_JOB_ID: waiting for Ray on $SLURM_JOB_NODELIST, at $address"
run python -c "$wait_for_nodes" "$SLURM_JOB_NUM_NODES" "${BIGINT8_START_SECONDS:-300}"
echo "job $SLURM_JOB_ID: $SLURM_JOB_NUM_NODES nodes are there"
run python -m bigint8.launch --address "$address" "$@"
