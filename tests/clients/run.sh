#!/usr/bin/env bash
# Other people's clients, unchanged and at pinned versions, against the real server. Each gets a base URL, a key and the name of a model;
# the servers run with default settings, or with those of docs/howto/clients.md.
# Usage: tests/clients/run.sh [CLIENT...], from: openai-python openai-js litellm langchain langchain-js llamaindex openwebui
# COAR_BIN selects the program (default: target/debug/coar, which is built), CLIENTS_DIR the folder for the packages (default:
# target/clients). A client that cannot be installed is skipped, with a message; with COAR_NEED_CLIENTS=1 that is a failure.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/clients
dir=${CLIENTS_DIR:-target/clients}
if [ $# = 0 ]; then
    set -- openai-python openai-js litellm langchain langchain-js llamaindex openwebui
fi
mkdir -p "$dir"
if [ -z "${COAR_BIN:-}" ]; then
    scripts/build-for-tests.sh
    COAR_BIN=target/debug/coar
fi
export COAR_BIN PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=tests/sdk
passed=() failed=() skipped=()

# skip NAME REASON
skip() {
    echo "SKIPPED, $1: $2" >&2
    skipped+=("$1")
}

# install NAME COMMAND...: the first error that a failing command prints is the reason.
install() {
    local name=$1
    shift
    if ! "$@" > "$dir/$name.log" 2>&1; then
        skip "$name" "$(grep -m 1 -E '^(ERROR:|npm error)' "$dir/$name.log" || tail -n 1 "$dir/$name.log")"
        return 1
    fi
}

# node_packages FOLDER: installs what its package.json names, only when that changes, so later runs need no package index.
node_packages() {
    if ! cmp -s "$1/package.json" "$1/installed"; then
        npm install --prefix "$1" --no-audit --no-fund --no-package-lock --loglevel error && cp "$1/package.json" "$1/installed"
    fi
}

# check NAME VENV FILE...: runs the tests and counts the result.
check() {
    local name=$1 venv=$2
    shift 2
    echo "=== $name"
    if "$venv/bin/python" -m pytest -q -p no:cacheprovider -p running "$@"; then
        passed+=("$name")
    else
        failed+=("$name")
    fi
}

# The environment of `make sdk`.
sdk_venv=${SDK_VENV:-target/sdk-venv}

for client in "$@"; do
    case $client in
    openai-python)
        # The tests of `make sdk` for this package; that suite also runs coar's own client.
        if install "$client" scripts/venv.sh "$sdk_venv" tests/sdk/requirements.txt; then
            check "$client" "$sdk_venv" tests/sdk/test_openai.py
        fi
        ;;
    openai-js | langchain-js)
        if ! command -v node > /dev/null || ! command -v npm > /dev/null; then
            skip "$client" "node or npm is not installed"
        elif install "$client" scripts/venv.sh "$sdk_venv" tests/sdk/requirements.txt; then
            # Packages are resolved from the folder of the program that imports them.
            mkdir -p "$dir/$client"
            cp "$here/$client/"* "$dir/$client/"
            if install "$client" node_packages "$dir/$client"; then
                CLIENT_NODE=$dir/$client check "$client" "$sdk_venv" "$here/test_${client/-/_}.py"
            fi
        fi
        ;;
    litellm | langchain | llamaindex | openwebui)
        if install "$client" scripts/venv.sh "$dir/$client" "$here/requirements.txt" "$here/requirements-$client.txt"; then
            check "$client" "$dir/$client" "$here/test_$client.py"
        fi
        ;;
    *)
        echo "tests/clients: there is no client $client" >&2
        exit 2
        ;;
    esac
done

echo "clients: passed: ${passed[*]:-none}; failed: ${failed[*]:-none}; skipped: ${skipped[*]:-none}"
[ ${#failed[@]} = 0 ]
[ ${#skipped[@]} = 0 ] || [ "${COAR_NEED_CLIENTS:-0}" != 1 ]
