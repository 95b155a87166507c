#!/usr/bin/env bash
# The official OpenAI package against the real server. Usage: tests/sdk/run.sh [PYTEST ARGUMENTS]
# COAR_BIN chooses the program (default: target/debug/coar, which is built), SDK_VENV where the packages go.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${SDK_VENV:-target/sdk-venv}
scripts/venv.sh "$venv" tests/sdk/requirements.txt
if [ -z "${COAR_BIN:-}" ]; then
    cargo build --bin coar
    COAR_BIN=target/debug/coar
fi
export COAR_BIN
exec "$venv/bin/python" -m pytest -p no:cacheprovider tests/sdk "$@"
