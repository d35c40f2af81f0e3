#!/usr/bin/env bash
# Makes or finds the environment, then runs the first test layer; arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

prepare_environment standin,train,dev
cd "$CHECKOUT"
exec "$PYTHON" -m pytest "$@"
