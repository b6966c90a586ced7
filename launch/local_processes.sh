#!/usr/bin/env bash
# Starts N processes on this machine, joined as if each were a host, to try several hosts without having them.
#
#   launch/local_processes.sh [--dry-run] N [--devices=D] [--restarts=R] -- \
#       --config=configs/quickstart.py --workdir=runs/two
#
# On a CPU each process gets D devices (default: 4). Process 0 writes to the terminal, the others to process_I.log in
# a temporary folder, shown if they fail. SIGTERM and Ctrl-C are passed on to all. If one is killed, or ends with
# status 75 (a step hangs, another process is lost), all are started again, up to R times (default: 0).
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=""
count=""
devices=4
restarts=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --devices=*) devices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --) shift; break ;;
    [1-9]*) count=$1 ;;
    *) usage ;;
  esac
  shift
done
[[ $count =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ && $# -gt 0 ]] || usage

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

port=12345
free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

command_of() { # INDEX ARGUMENTS...
  local index=$1
  shift
  command=("$python" -m deco_jax.main --coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$index" "$@")
}

if [[ $dry_run ]]; then
  echo "JAX_PLATFORMS=$JAX_PLATFORMS XLA_FLAGS='$XLA_FLAGS'"
  for ((i = 0; i < count; i++)); do
    command_of "$i" "$@"
    printf '%q ' "${command[@]}"
    echo
  done
  exit 0
fi

logs=$(mktemp -d)
pids=()
stopped=""
# shellcheck disable=SC2329  # by the traps
forward() { stopped=1; kill -TERM "${pids[@]}" 2>/dev/null || true; }
# Ctrl-C from a terminal reaches the processes directly; this is for those that ignore it.
trap forward TERM INT

# Sets status, and again: whether the processes ended in a way that a restart may fix.
run_all() {
  local i code
  pids=()
  status=0
  again=1
  port=$(free_port)
  for ((i = 0; i < count; i++)); do
    command_of "$i" "$@"
    if ((i == 0)); then "${command[@]}" & else "${command[@]}" >"$logs/process_$i.log" 2>&1 & fi
    pids+=($!)
  done
  if [[ $stopped ]]; then forward; fi # asked to stop before all had started
  for ((i = 0; i < count; i++)); do
    code=0
    wait "${pids[i]}" || code=$?
    # A trapped signal interrupts wait: ask again until the process itself has ended.
    while kill -0 "${pids[i]}" 2>/dev/null; do code=0; wait "${pids[i]}" || code=$?; done
    if ((code != 0)); then
      ((status != 0)) || status=$code
      ((code == 75 || code > 130)) || again=""
      echo "process $i ended with status $code" >&2
      if ((i > 0)) && [[ -e "$logs/process_$i.log" ]]; then tail -n 40 "$logs/process_$i.log" >&2; fi
    fi
  done
}

for ((attempt = 0; ; attempt++)); do
  run_all "$@"
  if ((status == 0 || attempt >= restarts)) || [[ $stopped || ! $again ]]; then break; fi
  echo "starting all again ($((attempt + 1)) of $restarts)" >&2
done
if ((status == 0)); then rm -rf "$logs"; else echo "logs: $logs" >&2; fi
exit "$status"
