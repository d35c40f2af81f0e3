#!/usr/bin/env bash
#SBATCH --job-name=gigapath-tile
#SBATCH --array=1-16
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# `sbatch scripts/slurm_tile.sh SLIDES --out DIR [OPTIONS OF TILE]`: each task does its share; options of sbatch win.
# Some tasks again: `SHARDS=16 sbatch --array=3,7 ...`. In a container: GIGAPATH="apptainer exec gigapath.sif gigapath".
set -euo pipefail
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "slurm_tile.sh: expected a task of a SLURM array. Submit it: sbatch scripts/slurm_tile.sh ..." >&2
    exit 2
fi
read -ra gigapath <<<"${GIGAPATH:-gigapath}"
out=.
before=''
for word in "$@"; do
    if [ "$before" = --out ]; then out=$word; elif [[ $word == --out=* ]]; then out=${word#--out=}; fi
    before=$word
done
idle=$out/.idle-$SLURM_ARRAY_TASK_ID # tries in a row that brought nothing before their limit, a character each
started=$(mktemp)
told='' signals=0
# Before the run, so that no signal kills this script. USR1 comes before the limit: the task goes on later. TERM comes
# from scancel, or at the limit after USR1.
trap 'told=USR1 signals=$((signals + 1)); kill -USR1 $(jobs -p) 2>/dev/null || true' USR1
trap 'told=${told:-TERM} signals=$((signals + 1)); kill -TERM $(jobs -p) 2>/dev/null || true' TERM
"${gigapath[@]}" tile "$@" --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_MAX}" &
[ -z "$told" ] || kill "-$told" $! 2>/dev/null || true # a signal that came before the run
while heard=$signals status=0; wait $! || status=$?; [ "$signals" != "$heard" ]; do :; done # a signal ends `wait` early
if [ "$told" = USR1 ]; then
    # 75: stopped by the signal; 138: the signal came before gigapath listened.
    case "$status" in
    75 | 138)
        new=$(find "$out" \( -name '*.h5' -o -name '*.partial' -size +0 \) -newer "$started" -print -quit 2>/dev/null || true)
        if [ -n "$new" ]; then rm -f "$idle"; else mkdir -p "$out" && printf . >>"$idle"; fi
        if [ "$(cat "$idle" 2>/dev/null)" = ... ]; then
            rm -f "$idle"
            echo "slurm_tile.sh: three tries in a row brought nothing before their limit: not put into the queue again. Raise --time." >&2
        else
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
    esac
fi
rm -f "$started"
exit "$status"
