#!/usr/bin/env bash
# From a clone to the embeddings of a slide, from any folder: `bash scripts/quickstart.sh [SLIDE [OPTIONS OF TILE]]`.
# Without an argument it takes a small public slide, or makes one. Results go to outputs/quickstart.
set -euo pipefail
# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

gigapath() { "$PYTHON" -m gigapath.cli.main "$@"; }

if [ $# -gt 0 ] && ! [ -e "$1" ]; then stop "expected a slide, found nothing at $1."; fi
prepare_environment standin

if [ $# -gt 0 ]; then
    slide=$1
    shift
elif slide=$CHECKOUT/data/CMU-1-Small-Region.svs && gigapath download demo-slide --to "$CHECKOUT/data"; then
    echo "The slide is CMU-1-Small-Region: a real one, H&E, CC0."
else
    slide=$CHECKOUT/data/made-slide.png
    set -- --slide-mpp 0.5
    "$PYTHON" "$CHECKOUT/tests/made_demo.py" "$slide"
    echo "No public slide could be fetched. The slide is one made on the spot: texture, not tissue."
fi

# The released model where a token opens it, the small one first where there is no GPU; else the stand-in.
encoder=standin
embedding=tile-mean
if "$PYTHON" -c 'import huggingface_hub as hub, sys; sys.exit(hub.get_token() is None)'; then
    names="gigapath-flash gigapath"
    if "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then names="gigapath gigapath-flash"; fi
    for name in $names; do
        if gigapath download "$name"; then
            encoder=$name
            embedding=default
            break
        fi
    done
fi
if [ "$encoder" = standin ]; then
    echo "The encoder is the stand-in: EfficientNet-Lite0 with ImageNet weights. It shows how things work; it is not GigaPath."
    echo "For the released model ask for access on its page (README, \"Weights\"), set HF_TOKEN and run this again."
else
    echo "The encoder is the released one, $encoder."
fi

out=$CHECKOUT/outputs/quickstart/$encoder
gigapath embed "$slide" --out "$out" --tile-encoder "$encoder" "$@"

lines="import gigapath
ids, vectors = gigapath.read_slides('$out', '$embedding')
print(ids, vectors.shape)"
printed=$("$PYTHON" -c "$lines")
echo
echo "The picture of what was kept:   $out/previews"
echo "The table of slides:            $out/slides.csv"
echo "The embeddings of the tiles:    $out/features_$encoder"
if [ "$PYTHON" = "$CHECKOUT/.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ]; then
    echo "For the command gigapath itself: source $CHECKOUT/.venv/bin/activate"
fi
echo "The embedding of the slide, read by three lines of Python, and what they print:"
echo
printf '%s\n' "$lines" "$printed"
