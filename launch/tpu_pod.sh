#!/usr/bin/env bash
# Runs the same command on all hosts of Cloud TPU slices, joined by jax.distributed.
#
#   launch/tpu_pod.sh [--dry-run] --name=xl --zone=us-west4-a [--project=P] [--folder=deco_jax] [--restarts=100] \
#       [--type=v5litepod-256 --version=v2-alpha-tpuv5-lite [--slices=N] [--spot] [--setup=COMMAND]] -- \
#       --config=configs/imagenet256.py --workdir=gs://bucket/runs/xl --config.mesh.fsdp=16
#
# Without --type, the slice --name must exist, with the code in --folder on every host, installed by:
#   pip install ".[tpu,gs]"    # [tpu,s3] for a workdir in s3://
# With --type, the script requests N slices as a queued resource, waits for them, and runs --setup (git clone, pip
# install) in the home folder of every host where it hasn't succeeded yet. If the slices are taken away, it requests them
# again and the run continues, up to --restarts times. It also restarts after a process was killed, hung or was asked to
# stop (75), but not after an error (1). The workdir must be in a bucket, or on a file system that all hosts share.
# Slices are left running at the end; this machine must stay on (tmux). For several slices, also give
# --config.mesh.slices=N.
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=""
name=""
zone=""
project=""
folder=deco_jax
type=""
version=""
slices=1
spot=""
setup=""
restarts=100
poll=${POLL_SECONDS:-30}
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --folder=*) folder=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --setup=*) setup=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $name && $zone && $# -gt 0 && $slices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]] || usage
[[ -z $type || $version ]] || usage

where=(--zone="$zone" ${project:+--project="$project"})
nodes=("$name")
node_flags=(--node-id="$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  node_flags=(--node-count="$slices" --node-prefix="$name")
fi

do_or_print() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Prints the state of the slices, or NONE if they were never requested. Any other failure of gcloud is tried again, because
# taking it for NONE would request slices that are there.
state() {
  local answer errors tries
  errors=$(mktemp)
  for ((tries = 0; ; tries++)); do
    if answer=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)" 2>"$errors"); then
      break
    elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
      answer=NONE
      break
    elif ((tries >= 10)); then
      cat "$errors" >&2
      rm -f "$errors"
      return 1
    fi
    sleep "$poll"
  done
  rm -f "$errors"
  echo "$answer"
}

create() {
  do_or_print gcloud compute tpus queued-resources create "$name" "${where[@]}" "${node_flags[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
}

# On all hosts of all slices at once; fails if one does.
everywhere() {
  local node code=0 pid
  local pids=()
  for node in "${nodes[@]}"; do
    if [[ $dry_run ]]; then
      do_or_print gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1"
    else
      gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]+"${pids[@]}"}"; do wait "$pid" || code=$?; done
  return "$code"
}

# Runs --setup on the hosts where it has not succeeded yet, whoever requested them: each keeps a note of it.
set_up() {
  local note
  [[ $setup ]] || return 0
  note="\$HOME/.deco_jax_setup_$(printf %s "$setup" | cksum | cut -d" " -f1)"
  everywhere "test -e $note || { ( eval $(printf %q "$setup") ) && touch $note; }"
}

# Waits until the slices exist; requests them again if they were taken away.
ready() {
  local now
  while :; do
    now=$(state) || exit 1
    case $now in
      ACTIVE) break ;;
      NONE) if ! create && [[ $(state) == NONE ]]; then exit 1; fi ;;
      FAILED | SUSPENDED)
        echo "the slices are $now: requesting them again" >&2
        gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
        continue
        ;;
      *) ;;
    esac
    sleep "$poll"
  done
  set_up
}

# A host restarts a process that was killed, or that ended with 75, as the others then do. After SIGTERM, which a host
# gets before it is taken away, that costs nothing: the connection ends, and new slices are requested below.
program="${PYTHON:-python3} -m deco_jax.main --distributed $(printf '%q ' "$@")"
remote="cd $(printf '%q' "$folder") && for i in \$(seq 0 $restarts); do $program; code=\$?; if [ \$code -ne 75 ] && [ \$code -le 130 ]; then break; fi; echo \"status \$code: starting again\" >&2; sleep 10; done; exit \$code"

if [[ $dry_run ]]; then
  if [[ $type ]]; then
    create
    set_up
  fi
  everywhere "$remote"
  exit 0
fi

for ((attempt = 0; ; attempt++)); do
  [[ -z $type ]] || ready
  code=0
  everywhere "$remote" || code=$?
  if ((code == 0)); then exit 0; fi
  # An error of the run itself would happen again, so only lost slices lead to a restart.
  if [[ -z $type ]] || ((attempt >= restarts)); then exit "$code"; fi
  sleep "$poll"
  now=$(state) || exit "$code"
  if [[ $now == ACTIVE ]]; then exit "$code"; fi
  echo "the slices were taken away ($now); continuing on new ones ($((attempt + 1)) of $restarts)" >&2
done
