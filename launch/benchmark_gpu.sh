#!/usr/bin/env bash
# Measures this machine's GPU in under ten minutes: training steps, sampling, Inception, memory.
# Writes benchmark.json and a table to a folder; the same command continues where it was stopped.
#
#   launch/benchmark_gpu.sh runs/benchmark_gpu [--minutes=10] [--smoke]
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[[ $# -gt 0 && $1 != -* ]] || usage
folder=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m launch.benchmark_gpu "$folder" "$@"
