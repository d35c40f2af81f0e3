#!/usr/bin/env bash
# PANDA, fine-tuning by the published recipe: `bash scripts/run_panda.sh [FOLDER OF H5 FILES [OPTIONS OF FINETUNE]]`.
# Labels and split are the published ones, in $PANDA_CSV or as `gigapath download panda` puts them.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if ! command -v gigapath >/dev/null; then
    # shellcheck source=scripts/bootstrap.sh
    source "$here/bootstrap.sh"
    prepare_environment train
    PATH=$(dirname "$PYTHON"):$PATH
fi

features=data/GigaPath_PANDA_embeddings/h5_files
if [ $# -gt 0 ] && [[ $1 != -* ]]; then features=$1 && shift; fi
csv=${PANDA_CSV:-data/dataset_csv/PANDA}
if ! [ -f "$csv/PANDA.csv" ]; then gigapath download panda; fi

# The published files do not say how far apart their tiles lie: it is 256. Files that do say it are taken at their word.
exec gigapath finetune --task panda --features "$features" --labels "$csv/PANDA.csv" --splits "$csv" \
    --tile-size-level0 256 --pretrained hf_hub:prov-gigapath/prov-gigapath --model-arch gigapath_slide_enc12l768d \
    --feat-layer 11 --max-wsi-size 250000 --dropout 0.1 --drop-path-rate 0 --epochs 5 --warmup-epochs 1 --batch-size 1 \
    --gradient-accumulation 32 --base-lr 0.002 --min-lr 1e-6 --weight-decay 0.05 --layer-decay 0.95 --out outputs/panda "$@"
