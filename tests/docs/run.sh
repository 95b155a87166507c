#!/usr/bin/env bash
# Pastes every command block of README.md, docs/tutorial.md and docs/howto/*.md as a reader would. Usage: tests/docs/run.sh [PAGE...]
# COAR_BIN and COAR_LAB_BIN choose the programs (default: target/debug/coar and target/debug/coar-lab). It builds nothing.
# DOCS_KEEP=1 keeps the folder that the pages ran in; a failed run keeps it anyway.
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts/venv.sh target/docs-venv examples/python/requirements.txt tests/docs/requirements.txt
# The Python client as it is now, from what is in the environment: no package index is asked.
target/docs-venv/bin/pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation ./clients/python
exec python3 -B tests/docs/run.py "$@"
