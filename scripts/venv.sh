#!/usr/bin/env bash
# venv.sh DIR REQUIREMENTS...: a Python environment with these packages. They are installed when the requirements change: a later run needs
# no package index, and the first one asks several times.
set -euo pipefail
dir=$1
shift
if ! cat "$@" | cmp -s - "$dir/installed"; then
    python3 -m venv "$dir"
    "$dir/bin/pip" install --quiet --disable-pip-version-check --retries 8 --timeout 30 "${@/#/--requirement=}"
    cat "$@" > "$dir/installed"
fi
