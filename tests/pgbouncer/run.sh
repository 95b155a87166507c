#!/usr/bin/env bash
# Run under scripts/with-postgres.sh: PgBouncer in transaction mode is rejected, and in session mode accepted. Skipped
# with a message if PgBouncer is not installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PATH:/usr/sbin"
if ! command -v pgbouncer > /dev/null; then
    echo "SKIPPED  PgBouncer is not installed (Debian: apt-get install pgbouncer)" >&2
    [ "${NO_SKIP:-0}" != 1 ]
    exit
fi
work="$(mktemp -d)"
pids=()
finish() {
    for pid in "${pids[@]:-}"; do
        [ -z "$pid" ] || kill "$pid" 2> /dev/null || true
    done
    wait
    rm -rf "$work"
}
trap finish EXIT
as_user=()
if [ "$(id -u)" = 0 ]; then
    chown postgres "$work"
    as_user=(setpriv --reuid=postgres --regid=postgres --clear-groups)
fi
server="${COAR_TEST_DATABASE##*:}"
server="${server%%/*}"
# pooler NAME MODE: starts a PgBouncer and writes its port to a file.
pooler() {
    port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    cat > "$work/$1.ini" <<INI
[databases]
* = host=127.0.0.1 port=$server user=coar
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $port
unix_socket_dir =
auth_type = any
auth_file = /dev/null
ignore_startup_parameters = extra_float_digits
pool_mode = $2
logfile = $work/$1.log
INI
    chmod 644 "$work/$1.ini"
    "${as_user[@]}" pgbouncer -q "$work/$1.ini" &
    pids+=($!)
    until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
        kill -0 "${pids[-1]}" || { echo "FAILED   pgbouncer ended" >&2; exit 1; }
    done
    echo "$port" > "$work/$1.port"
}
pooler transaction transaction
pooler session session
COAR_TEST_POOLER="postgres://coar@127.0.0.1:$(cat "$work/transaction.port")/postgres" \
    COAR_TEST_DATABASE="postgres://coar@127.0.0.1:$(cat "$work/session.port")/postgres" \
    scripts/crate-tests.sh coar-registry postgres::
echo "ok       PgBouncer: transaction mode is refused, session mode passes"
