#!/bin/sh
# Run bigint8 as a job on a Ray cluster: see the usage below, or start it without arguments.
set -u

usage() {
    cat >&2 <<'END'
usage: launch/submit.sh [ADDRESS] -- ARGUMENTS...

Runs `python -m bigint8.launch --address auto ARGUMENTS...` as a job on a Ray cluster, shows its output and exits with
0 if it succeeded, with 1 if it failed or was stopped. Ctrl-C ends the watching, not the job.

ADDRESS    of the cluster's dashboard; by default $RAY_API_SERVER_ADDRESS, or else http://127.0.0.1:8265
ARGUMENTS  of bigint8.launch; a folder among them must be readable under the same path on every node

for example: launch/submit.sh -- --model opt-13b --gpus 4 --prompt "The capital of France is"
END
    exit 2
}

[ $# -gt 0 ] || usage
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
if [ "$1" != -- ]; then
    address=$1
    shift
fi
[ $# -gt 1 ] && [ "$1" = -- ] || usage
shift

# Ray quotes each word of the command for the job's shell: the arguments arrive as they were given here.
job=bigint8-$(date +%Y%m%d-%H%M%S)-$$
ray job submit --address "$address" --submission-id "$job" -- python -m bigint8.launch --address auto "$@" || exit 1

# To `ray job submit` a job that somebody stopped is no failure; here it is one.
ray job status --address "$address" "$job" 2>&1 | grep -q "'$job' succeeded"
