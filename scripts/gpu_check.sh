#!/usr/bin/env bash
# The first ten minutes with a GPU: what only a GPU can tell, as one table; --help says more. It takes the Python that is
# there ($PYTHON, the active environment's, .venv, else python3), and installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
fi
exec "${python:-python3}" -m scripts.bench.gpu_check "$@"
