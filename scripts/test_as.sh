#!/usr/bin/env bash
# Runs a test layer as on another machine; arguments after the first go to pytest (`-m slow` for the slow layer).
#   bash scripts/test_as.sh avx2      with the instructions of a CPU without AVX-512
#   bash scripts/test_as.sh lowest    with the lowest versions that pyproject.toml allows, the tools of tests at their newest
set -euo pipefail
# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

prepare_environment standin,train,lora,dev
cd "$CHECKOUT"
case ${1:-} in
avx2) export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ;;
lowest)
    "$PYTHON" -m pip install --quiet uv
    lowest=$CHECKOUT/.venv-lowest/bin/python
    "$PYTHON" -m uv venv --quiet --clear --python "$PYTHON" "$CHECKOUT/.venv-lowest"
    "$PYTHON" -m uv pip install --quiet --python "$lowest" --resolution lowest-direct --editable "${CHECKOUT}[standin,train]"
    "$PYTHON" -m uv pip install --quiet --python "$lowest" --editable "${CHECKOUT}[dev]" # keeps what is installed
    PYTHON=$lowest
    ;;
*) stop "expected avx2 or lowest, got '${1:-}'." ;;
esac
shift
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n 3 --dist loadfile "$@"
