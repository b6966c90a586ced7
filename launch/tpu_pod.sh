#!/usr/bin/env bash
# All hosts of a Cloud TPU slice: the same command on each, joined by jax.distributed through the slice's metadata.
#
#   launch/tpu_pod.sh [--dry-run] --name=my-v5e-256 --zone=us-west4-a [--project=P] [--folder=deco_jax] -- \
#       --config=configs/imagenet256.py --workdir=/mnt/shared/runs/xl --config.mesh.data=16 --config.mesh.fsdp=16
#
# The workdir must be on a file system that all hosts share (Filestore, or a bucket through gcsfuse). The code must
# lie in --folder on every host, installed with: pip install -r requirements.txt "jax[tpu]"
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=""
name=""
zone=""
project=""
folder=deco_jax
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --folder=*) folder=${1#*=} ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $name && $zone && $# -gt 0 ]] || usage

remote="cd $(printf '%q' "$folder") && exec ${PYTHON:-python3} -m deco_jax.main --distributed $(printf '%q ' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${project:+--project="$project"} --worker=all --command="$remote")
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
