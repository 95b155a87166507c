#!/usr/bin/env bash
# The official OpenAI package, the example programs and the Python client (clients/python) against the real server.
# Usage: tests/sdk/run.sh [PYTEST ARGUMENTS]
# COAR_BIN selects the program (default: target/debug/coar, which is built), SDK_VENV the environment for the packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${SDK_VENV:-target/sdk-venv}
scripts/venv.sh "$venv" tests/sdk/requirements.txt
# The current client, built with the packages in the environment, without a package index.
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation ./clients/python
if [ -z "${COAR_BIN:-}" ]; then
    scripts/build-for-tests.sh
    COAR_BIN=target/debug/coar
fi
export COAR_BIN PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=tests/sdk
exec "$venv/bin/python" -m pytest -p no:cacheprovider -p running tests/sdk clients/python/tests "$@"
