#!/usr/bin/env bash
# Sends requests generated from /openapi.json to a real server, with all checks: no 5xx, nothing that the document does not allow.
# Usage: tests/fuzz_api/run.sh [EXAMPLES] [SCHEMATHESIS ARGUMENT...]
#   tests/fuzz_api/run.sh                                        the check for every change
#   tests/fuzz_api/run.sh 300                                    more than 2 000 cases
#   tests/fuzz_api/run.sh 50 --include-path-regex admin          one part of the API
# Under scripts/with-postgres.sh, which sets COAR_TEST_DATABASE and COAR_TEST_BLOBS, on PostgreSQL and S3; otherwise on SQLite and files.
# COAR selects the binary (default: target/debug/coar), FUZZ_VENV the fuzzer's environment, SEED the random seed.
set -euo pipefail
cd "$(dirname "$0")/../.."
examples=${1:-10}
[ $# -eq 0 ] || shift
# Two generations run concurrently on a shared CPU: their duration depends on the machine, and the document does not limit it. With the
# fuzzer's default limit of 10 seconds, findings differed from run to run, as they did with examples that it had kept from earlier runs.
patience=180
coar=${COAR:-target/debug/coar} venv=${FUZZ_VENV:-target/fuzz-venv}
scripts/venv.sh "$venv" tests/fuzz_api/requirements.txt
work=$(mktemp -d)
storage=(--data "$work/data")
if [ -n "${COAR_TEST_DATABASE:-}" ]; then
    # The database is empty and used by this server only.
    storage+=(--database "$COAR_TEST_DATABASE" --blobs "$COAR_TEST_BLOBS/fuzz")
fi
"$coar" keys create --tenant fuzz --scopes read,generate,train,admin "${storage[@]}" >"$work/key" 2>"$work/log"
"$coar" serve --listen 127.0.0.1:0 --device cpu --quota-requests-per-minute 0 "${storage[@]}" >"$work/address" 2>>"$work/log" &
server=$!
finish() {
    rc=$?
    kill "$server" 2>>"$work/log" || true
    wait "$server" || true
    if [ "$rc" -ne 0 ]; then
        echo "the server's log ends with:"
        tail -n 20 "$work/log"
    fi
    rm -rf "$work"
}
trap finish EXIT
for _ in $(seq 600); do
    url=$(sed -n 's/^listening on //p' "$work/address")
    if [ -n "$url" ] && "$venv/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/readyz")' "$url" 2>>"$work/log"; then
        ready=1
        break
    fi
    kill -0 "$server"
    sleep 0.2
done
[ -n "${ready:-}" ]
"$venv/bin/schemathesis" --config-file tests/fuzz_api/schemathesis.toml run "$url/openapi.json" \
    --header "Authorization: Bearer $(cat "$work/key")" \
    --checks all --max-examples "$examples" --seed "${SEED:-1}" --workers 2 --suppress-health-check all \
    --max-response-time "$patience" --request-timeout "$patience" --generation-database none "$@"
# The server is still running and ready.
"$venv/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/readyz")' "$url"
