#!/usr/bin/env bash
# venv.sh DIR REQUIREMENTS...: creates a Python environment with these packages. They are installed only when the requirements change, so
# later runs need no package index. Connection errors are retried.
set -euo pipefail
dir=$1
shift
if ! cat "$@" | cmp -s - "$dir/installed"; then
    python3 -m venv "$dir"
    "$dir/bin/pip" install --quiet --disable-pip-version-check --retries 8 --timeout 30 "${@/#/--requirement=}"
    cat "$@" > "$dir/installed"
fi
