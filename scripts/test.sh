#!/usr/bin/env bash
# Makes or finds the environment, then runs the first test layer in three processes of one thread each, which keep two
# cores busy while one of them waits; arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

prepare_environment standin,train,lora,dev
cd "$CHECKOUT"
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n 3 --dist loadfile "$@"
