#!/usr/bin/env bash
# Runs a folder of tests beside this script against live clusters: clients/run.sh FOLDER [pytest arguments]
#
# MILLRACE_BIN         the program [default: target/debug/millrace, built if it is not there]
# MILLRACE_TEST_MODEL  the model [default: smollm2:135m, from the cache or fetched]
# The virtual environment lies in the cache, outside the clone, and is made once for each requirements.txt.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
suite="${1:-}"
[ -f "$here/$suite/requirements.txt" ] && [ -n "$suite" ] || {
    echo "usage: clients/run.sh FOLDER [pytest arguments]; folders: $(cd "$here" && echo */requirements.txt | sed 's|/requirements.txt||g')" >&2
    exit 2
}
shift
root=$(cd "$here/.." && pwd)
target="${CARGO_TARGET_DIR:-$root/target}"
if [ -z "${MILLRACE_BIN:-}" ]; then
    (cd "$root" && cargo build --locked --quiet --bin millrace)
    MILLRACE_BIN="$target/debug/millrace"
fi
export MILLRACE_BIN
cd "$here/$suite"
wanted=$(cat requirements.txt <(python3 --version) | cksum | cut -d' ' -f1)
venv="${XDG_CACHE_HOME:-$HOME/.cache}/millrace-ci/$suite-$wanted"
if [ ! -e "$venv/complete" ]; then
    rm -rf "$venv"
    if command -v uv >/dev/null; then
        uv venv --quiet "$venv"
        VIRTUAL_ENV="$venv" uv pip install --quiet -r requirements.txt
    else
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
    fi
    touch "$venv/complete"
fi
# What a folder needs beside Python.
[ ! -x setup.sh ] || ./setup.sh "$venv/bin/python"
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$@" .
