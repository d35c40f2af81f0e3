#!/usr/bin/env bash
# PCam, the linear probe by the published recipe: `bash scripts/run_pcam.sh [EMBEDDINGS [OPTIONS OF PROBE]]`.
# EMBEDDINGS are the published zip (default) or your own; `bash scripts/run_pcam.sh --demo` needs none.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if ! command -v gigapath >/dev/null; then
    # shellcheck source=scripts/bootstrap.sh
    source "$here/bootstrap.sh"
    prepare_environment train
    PATH=$(dirname "$PYTHON"):$PATH
fi

embeddings=data/GigaPath_PCam_embeddings.zip
if [ "${1-}" = --demo ]; then embeddings=--demo && shift; fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then embeddings=$1 && shift; fi

# Where `gigapath download pcam` puts the labels, and PCam's own tables of slides.
data=$(dirname -- "$embeddings")
if [[ $embeddings == *.zip && -d $data/pcam ]]; then set -- --pcam-meta "$data/pcam" "$@"; fi
if [[ $embeddings == *.zip && -f $data/dataset_csv/pcam/pcam.csv ]]; then
    set -- --labels "$data/dataset_csv/pcam/pcam.csv" "$@"
fi
if [[ $embeddings == *.zip && -f $embeddings && " $*" != *" --labels"* ]]; then
    echo "run_pcam.sh: expected labels in $data/dataset_csv/pcam/pcam.csv, found none. Fetch them:" \
        "gigapath download pcam --to $data; or name yours: --labels CSV" >&2
    exit 2
fi

exec gigapath probe "$embeddings" --solver sgd --steps 4000 --batch-size 128 --lr 0.02 --weight-decay 0.01 \
    --eval-every 100 --seed 0 --out outputs/pcam "$@"
