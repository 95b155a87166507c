#!/usr/bin/env bash
# run.sh: faults at random times (SEED, FAULTS, MINUTES, ONLY). run.sh NAME...: single measurements of limits.py.
# Needs PostgreSQL (Debian: apt-get install postgresql) and Python 3.10; faketime for clock jumps. COAR_BIN selects a binary other
# than target/debug/coar. Without PostgreSQL it is skipped with a message, unless COAR_NEED_POSTGRES=1.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql) >/dev/null 2>&1 || true
fi
if ! ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1; then
    echo "SKIPPED, PostgreSQL is not installed (Debian: apt-get install postgresql)" >&2
    [ -z "${COAR_NEED_POSTGRES:-}" ]
    exit
fi
if ! ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq faketime >/dev/null 2>&1 || true
    fi
    ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 ||
        echo "SKIPPED, clocks do not jump: faketime is not installed (Debian: apt-get install faketime)" >&2
fi
[ -n "${COAR_BIN:-}" ] || scripts/build-for-tests.sh --quiet
if [ $# -gt 0 ]; then
    exec python3 tests/faults/limits.py "$@"
fi
exec python3 tests/faults/main.py
