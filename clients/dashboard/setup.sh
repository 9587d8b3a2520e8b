#!/usr/bin/env bash
# A browser for the tests, where there is none: Playwright's own, or the system's Chromium.
#
# CHROMIUM  a browser's program to take instead
set -euo pipefail
python="$1"
for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
    if [ -n "$name" ] && command -v "$name" >/dev/null; then exit 0; fi
done
if "$python" -m playwright install --with-deps chromium-headless-shell; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium
    exit 0
fi
echo "No browser: install Chromium (apt install chromium), or name one in CHROMIUM." >&2
exit 1
