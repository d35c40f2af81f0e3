#!/usr/bin/env bash
#SBATCH --job-name=gigapath-embed
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# `sbatch scripts/slurm_embed.sh SLIDES --out DIR [OPTIONS OF EMBED]`: as slurm_tile.sh, with weights downloaded ahead.
# In a container: GIGAPATH="apptainer exec --nv gigapath.sif gigapath".
set -euo pipefail
read -ra gigapath <<<"${GIGAPATH:-gigapath}"
told=''
trap 'told=1; kill -USR1 $(jobs -p) || true' USR1 TERM # before the run, so that no signal kills this script
HF_HUB_OFFLINE=1 "${gigapath[@]}" embed --device cuda "$@" --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_MAX}" &
[ -z "$told" ] || kill -USR1 $! || true # a signal that came before the run
while told='' status=0; wait $! || status=$?; [ -n "$told" ]; do :; done # a trapped signal ends `wait` early
case "$status" in 75 | 138) scontrol requeue "$SLURM_JOB_ID" ;; esac # 138: the signal came before gigapath listened
exit "$status"
