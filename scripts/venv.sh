#!/usr/bin/env bash
# venv.sh DIR REQUIREMENTS: a Python environment with these packages. They are installed when the requirements change: a later run needs
# no package index, and the first one asks several times.
set -euo pipefail
if ! cmp -s "$2" "$1/installed"; then
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check --retries 8 --timeout 30 -r "$2"
    cp "$2" "$1/installed"
fi
