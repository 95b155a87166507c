#!/usr/bin/env bash
# Pastes every command block of README.md, docs/tutorial.md and docs/howto/*.md as a reader would. Usage: tests/docs/run.sh [PAGE...]
# COAR_BIN and COAR_LAB_BIN select the programs (default: target/debug/coar and target/debug/coar-lab), which are not built.
# DOCS_KEEP=1 keeps the folder that the pages ran in; a failed run always keeps it.
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts/venv.sh target/docs-venv examples/python/requirements.txt tests/docs/requirements.txt
# The current Python client, built with the packages in the environment, without a package index.
target/docs-venv/bin/pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation ./clients/python
exec python3 -B tests/docs/run.py "$@"
