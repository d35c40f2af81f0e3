#!/usr/bin/env bash
# From a clone to the embeddings of a slide, from any folder: `bash scripts/quickstart.sh [SLIDE [OPTIONS OF TILE]]`.
# Without an argument it takes a small public slide, or makes one. Results go to outputs/quickstart.
set -euo pipefail
# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

if [ $# -gt 0 ]; then
    if ! [ -e "$1" ]; then stop "expected a slide, found nothing at $1."; fi
    slide=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
    set -- "$slide" "${@:2}"
fi
prepare_environment standin
if [ "$PYTHON" = "$CHECKOUT/.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ]; then
    echo "For the command gigapath itself: source $CHECKOUT/.venv/bin/activate"
fi
cd "$CHECKOUT"
exec "$PYTHON" -m gigapath.cli.main demo "$@" --out "$CHECKOUT/outputs/quickstart"
