#!/usr/bin/env bash
# Tests a server behind a real nginx with the configurations of docs/howto/service.md: at the root, and under a path. With NO_SKIP=1
# a missing nginx is a failure.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PATH:/usr/sbin"
if ! command -v nginx > /dev/null; then
    echo "SKIPPED  the server behind a proxy: nginx is not installed (Debian: apt-get install nginx-light)" >&2
    [ "${NO_SKIP:-0}" != 1 ]
    exit
fi
exec python3 tests/proxy/behind.py "${CARGO_TARGET_DIR:-target}/debug/coar"
