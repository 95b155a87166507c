#!/bin/sh
# Writes docker/.env, which docker/compose.yaml reads: a new password for each part. An existing one is left as it is.
# With a path as argument, that file.
set -eu
file="${1:-$(dirname "$0")/.env}"
if [ -e "$file" ]; then
    echo "$file is there already; it is left as it is" >&2
    exit 0
fi
# Hexadecimal: no character of it has a meaning in an address or a shell.
secret() { od -An -N 24 -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
partial="$file.partial.$$"
trap 'rm -f "$partial"' EXIT
{
    echo "# Passwords of docker/compose.yaml, made by docker/env.sh. Who has this file has everything."
    echo "POSTGRES_PASSWORD=$(secret)"
    echo "S3_ACCESS_KEY=$(secret)"
    echo "S3_SECRET_KEY=$(secret)"
    echo "GRAFANA_PASSWORD=$(secret)"
} > "$partial"
mv "$partial" "$file"
echo "wrote $file" >&2
