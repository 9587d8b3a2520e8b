#!/usr/bin/env bash
# The packages of package-lock.json, in the virtual environment of the Python that is given: node (20 or later) and npm are needed.
set -euo pipefail
place="$(dirname "$(dirname "$1")")/node"
mkdir -p "$place"
if ! cmp -s package-lock.json "$place/package-lock.json"; then
    cp package.json package-lock.json "$place"
    npm ci --prefix "$place" --no-audit --no-fund --silent || { rm "$place/package-lock.json"; exit 1; }
fi
