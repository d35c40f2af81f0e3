# Sourced by the scripts beside it: `prepare_environment EXTRAS` leaves $PYTHON, the interpreter of an environment in
# which this checkout is installed (editable) with the named extras, such as standin,dev.
#
# The environment is the active one (virtualenv, or conda other than its base), else .venv in the checkout. pip runs
# with the user's own settings: no index is named here. A PyTorch that is there already stays as it is. A stamp in the
# environment makes the second time quick; it is void when pyproject.toml, Python or the checkout's place changes.
# shellcheck shell=bash

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

stop() { # one sentence to the user, and no more
    echo "${0##*/}: $*" >&2
    exit 1
}

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_environment() { # sets PYTHON; makes .venv where no environment is active
    local candidate prefix=${VIRTUAL_ENV:-}
    if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then prefix=${CONDA_PREFIX:-}; fi
    if [ -n "$prefix" ]; then
        PYTHON=$prefix/bin/python
        recent_enough "$PYTHON" ||
            stop "the active environment $prefix has no Python 3.11 or newer. Deactivate it, or activate a newer one."
        return
    fi
    PYTHON=$CHECKOUT/.venv/bin/python
    if recent_enough "$PYTHON"; then return; fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if recent_enough "$candidate"; then
            echo "Making an environment in $CHECKOUT/.venv ($("$candidate" --version))"
            # --clear: an environment whose Python has gone, or that was left half made, is made anew
            "$candidate" -m venv --clear "$CHECKOUT/.venv" >"$LOG" 2>&1 || explain_failure \
                "Python could not make an environment. Install the venv module (Debian: apt install python3-venv), or activate an environment of your own."
            return
        fi
    done
    stop "expected Python 3.11 or newer, found $(python3 --version 2>&1 || true). Install one, or activate a conda environment that has one."
}

explain_failure() { # the log's last lines, then one sentence: the known cause, else $1
    { grep -v '^WARNING' "$LOG" || true; } | tail -n 12 | cut -c 1-200 >&2
    if grep -qE 'No space left on device|Disk quota exceeded' "$LOG"; then
        stop "the disk is full. PyTorch for CUDA needs about 6 GB, its CPU build about 1 GB; free some space, or set TMPDIR and the environment to another disk, and run this again."
    elif grep -qE 'Connection|NameResolution|name resolution|Network is unreachable|timed out|ProxyError' "$LOG"; then
        stop "pip cannot reach its package index. Check the network, or pip's own settings ('pip config list'), and run this again."
    elif grep -qE 'conflicting dependencies|ResolutionImpossible' "$LOG"; then
        stop "the PyTorch of this environment, or a constraint of pip's settings, does not fit what gigapath needs ($CHECKOUT/pyproject.toml). Activate another environment, or none."
    fi
    stop "$1"
}

# Is what the stamp names what is wanted? Prints "ready", else the stamp's new text. argv: checkout, extras
STAMP_CHECK='
import hashlib, importlib.util, pathlib, sys
checkout, wanted = pathlib.Path(sys.argv[1]), set(sys.argv[2].split(","))
key = f"{checkout} {sys.version.split()[0]} " + hashlib.sha256((checkout / "pyproject.toml").read_bytes()).hexdigest()
stamp = pathlib.Path(sys.prefix, "gigapath-installed.txt")
lines = stamp.read_text().splitlines() if stamp.is_file() else []
had = set(lines[1].split(",")) if lines[:1] == [key] else set()
if wanted <= had and importlib.util.find_spec("torch") and importlib.util.find_spec("gigapath"):
    print("ready")
else:
    print(key, ",".join(sorted(wanted | had)), sep="\n")
'
TORCH_IN_PLACE='
from importlib import metadata
for name in ("torch", "torchvision"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
'

prepare_environment() { # $1: extras, comma-separated
    LOG=$(mktemp) || stop "the folder for temporary files is full or can't be written. Set TMPDIR to another one."
    find_environment
    local stamp
    stamp=$(cd / && "$PYTHON" -c "$STAMP_CHECK" "$CHECKOUT" "$1")
    if [ "$stamp" != ready ]; then
        install_checkout "$1"
        echo "$stamp" >"$("$PYTHON" -c 'import sys; print(sys.prefix)')/gigapath-installed.txt"
    fi
    rm -f "$LOG"
    export PYTHON
}

install_checkout() {
    local keep
    "$PYTHON" -m pip --version >"$LOG" 2>&1 || "$PYTHON" -m ensurepip >>"$LOG" 2>&1 ||
        explain_failure "the environment of $PYTHON has no pip. Install pip there, or activate another environment."
    keep=$(mktemp)
    "$PYTHON" -c "$TORCH_IN_PLACE" >"$keep"
    if [ -s "$keep" ]; then echo "Keeping $(paste -sd ' ' "$keep")"; fi
    echo "Installing gigapath[$1] with pip; the first time takes minutes, most of them for PyTorch"
    if ! "$PYTHON" -m pip install --constraint "$keep" --editable "${CHECKOUT}[$1]" 2>&1 | tee "$LOG" |
        { grep --line-buffered -E '^(Collecting|Installing)' || true; } | cut -c 1-100; then
        rm -f "$keep"
        explain_failure "pip could not install what gigapath needs; its last lines are above."
    fi
    rm -f "$keep"
    "$PYTHON" -c 'import torch, torchvision' >"$LOG" 2>&1 ||
        explain_failure "torch and torchvision of this environment do not fit together. Install a pair of one release (pytorch.org tells the command), and run this again."
}
