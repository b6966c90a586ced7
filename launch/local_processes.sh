#!/usr/bin/env bash
# N processes on this machine, joined as if each were a host: for trying several hosts without having them.
#
#   launch/local_processes.sh [--dry-run] N [--devices=D] -- --config=configs/quickstart.py --workdir=runs/two
#
# On a CPU each process gets D devices (4 if not said). Process 0 writes to the terminal, the others to
# process_I.log in a temporary folder, shown if they fail. SIGTERM and Ctrl-C are passed on to all.
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=""
count=""
devices=4
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --devices=*) devices=${1#*=} ;;
    --) shift; break ;;
    [1-9]*) count=$1 ;;
    *) usage ;;
  esac
  shift
done
[[ $count =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ && $# -gt 0 ]] || usage

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

if [[ $dry_run ]]; then
  port=12345
else
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

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
# shellcheck disable=SC2329  # by the traps
forward() { kill -"$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM
# Ctrl-C reaches the processes by itself where a terminal sends it; this is for those that ignore it.
trap 'forward TERM' INT
for ((i = 0; i < count; i++)); do
  command_of "$i" "$@"
  if ((i == 0)); then "${command[@]}" & else "${command[@]}" >"$logs/process_$i.log" 2>&1 & fi
  pids+=($!)
done

status=0
for ((i = 0; i < count; i++)); do
  code=0
  wait "${pids[i]}" || code=$?
  # A trapped signal interrupts wait: ask again until the process itself has ended.
  while kill -0 "${pids[i]}" 2>/dev/null; do code=0; wait "${pids[i]}" || code=$?; done
  if ((code != 0)); then
    ((status != 0)) || status=$code
    echo "process $i ended with status $code" >&2
    if ((i > 0)); then tail -n 40 "$logs/process_$i.log" >&2; fi
  fi
done
if ((status == 0)); then rm -rf "$logs"; else echo "logs: $logs" >&2; fi
exit "$status"
