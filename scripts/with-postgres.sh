#!/usr/bin/env bash
# with-postgres.sh CMD...: runs a command with a temporary PostgreSQL server and S3 server on free ports of 127.0.0.1, and stops
# them afterwards. PostgreSQL is the Debian package's, S3 is moto's (Python). COAR_TEST_DATABASE, COAR_TEST_BLOBS and the AWS_*
# variables tell the command how to reach them. Without PostgreSQL the command is skipped with a message; with
# COAR_NEED_POSTGRES=1 that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

missing() {
    echo "SKIPPED, $1: $*" >&2
    [ -z "${COAR_NEED_POSTGRES:-}" ]
    exit
}

newest() { find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -1 || true; }
postgres_bin=$(newest)
if [ -z "$postgres_bin" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql) >/dev/null 2>&1 || true
        postgres_bin=$(newest)
    fi
    [ -n "$postgres_bin" ] || missing "PostgreSQL is not installed (Debian: apt-get install postgresql)" "$@"
fi

venv=target/s3-venv
if [ ! -x "$venv/bin/moto_server" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet 'moto[server,s3]==5.2.1' boto3
fi

dir=$(mktemp -d)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
postgres_pid='' moto_pid=''
finish() {
    [ -z "$moto_pid" ] || kill "$moto_pid" 2>/dev/null || true
    [ -z "$postgres_pid" ] || kill -INT "$postgres_pid" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap finish EXIT

# PostgreSQL does not run as root.
as_user=()
if [ "$(id -u)" = 0 ]; then
    chown postgres "$dir"
    chmod 755 "$dir"
    as_user=(setpriv --reuid=postgres --regid=postgres --clear-groups)
fi
"${as_user[@]}" "$postgres_bin/initdb" -D "$dir/postgres" -U coar --auth=trust --no-sync >"$dir/initdb.log"
port=$(free_port)
"${as_user[@]}" "$postgres_bin/postgres" -D "$dir/postgres" -k "$dir" -p "$port" -c listen_addresses=127.0.0.1 \
    -c fsync="${COAR_TEST_FSYNC:-off}" -c max_connections=300 >"$dir/postgres.log" 2>&1 &
postgres_pid=$!
s3_port=$(free_port)
"$venv/bin/moto_server" -H 127.0.0.1 -p "$s3_port" >"$dir/s3.log" 2>&1 &
moto_pid=$!

export AWS_ENDPOINT_URL="http://127.0.0.1:$s3_port" AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
for _ in $(seq 100); do
    if "$postgres_bin/pg_isready" -q -h 127.0.0.1 -p "$port" -U coar &&
        curl -sf -X PUT "$AWS_ENDPOINT_URL/coar-test" >/dev/null; then
        break
    fi
    sleep 0.1
done
export COAR_TEST_DATABASE="postgres://coar@127.0.0.1:$port/postgres" COAR_TEST_BLOBS=s3://coar-test
export COAR_TEST_POSTGRES_BIN="$postgres_bin"
"$@"
