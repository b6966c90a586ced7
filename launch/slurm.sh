#!/usr/bin/env bash
# Runs on the GPUs of one or several SLURM nodes: one process per GPU, joined by jax.distributed.
#
#   launch/slurm.sh [--dry-run] [--nodes=2] [--gpus=8] [--cpus=8] [--time=24:00:00] [--name=deco] \
#       [--restarts=20] [--sbatch=OPTION ...] -- --config=configs/imagenet256.py --workdir=/shared/runs/xl --config.mesh.fsdp=8
#
# --gpus is per node, --cpus per GPU (shared by its data workers); options such as --sbatch=--partition=x are passed on.
# The workdir must be on a file system that all nodes share, or in a bucket. Two minutes before its time limit, the job
# gets SIGTERM, saves, and is queued again. The same happens after a process was killed or a step hung (status 75), up
# to --restarts times, unless the job had run for less than two minutes. --dry-run prints the batch script.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=""
nodes=1
gpus=8
cpus=8
limit=24:00:00
name=deco
restarts=20
extra=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --sbatch=*) extra+=("${1#*=}") ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ && $cpus =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ && $# -gt 0 ]] || usage

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
arguments=$(printf '%q ' "$@")
batch() {
  cat <<SBATCH
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$limit
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
SBATCH
  for option in "${extra[@]+"${extra[@]}"}"; do echo "#SBATCH $option"; done
  cat <<SBATCH
set -uo pipefail
cd $(printf '%q' "$root") || exit 1

stopped=""
step=""
early="" # asked to stop before the number of the step was known
# shellcheck disable=SC2329  # by the trap
stop() { stopped=1; if [[ \$step ]]; then kill -TERM "\$step"; else early=1; fi; }
trap stop TERM
# srun doesn't inherit it from the job.
export SRUN_CPUS_PER_TASK=$cpus
# Every task sees all GPUs of its node and uses the one with its local number.
srun --kill-on-bad-exit=1 --gpu-bind=none ${PYTHON:-python} -m deco_jax.main $arguments&
step=\$!
if [[ \$early ]]; then kill -TERM "\$step"; fi
wait "\$step"
code=\$?
if [[ \$stopped ]]; then
  wait "\$step"
  code=\$?
  # Saved, with 75, or killed while it did: to be continued. With 0 the run was done.
  if [[ \$code -eq 75 || \$code -gt 130 ]]; then scontrol requeue "\$SLURM_JOB_ID"; fi
elif [[ \$code -eq 75 || \$code -gt 130 ]] && ((SECONDS > 120 && \${SLURM_RESTART_COUNT:-0} < $restarts)); then
  echo "status \$code after \$SECONDS s: queued again"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
SBATCH
}

if [[ $dry_run ]]; then batch; else batch | sbatch; fi
