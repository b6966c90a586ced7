#!/usr/bin/env bash
# Runs on one GPU of this machine.
#
#   launch/single_gpu.sh [--dry-run] [--gpu=0] -- --config=configs/cifar10.py --workdir=runs/cifar10
set -euo pipefail

usage() { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=""
gpu=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --gpu=*) gpu=${1#*=} ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $gpu =~ ^[0-9]+$ && $# -gt 0 ]] || usage

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES=$gpu
command=("${PYTHON:-python}" -m deco_jax.main "$@")
if [[ $dry_run ]]; then
  printf 'CUDA_VISIBLE_DEVICES=%s' "$gpu"
  printf ' %q' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
