#!/bin/bash
# Whether a coar server answers 200: coar-healthy [PATH [HOST PORT]]. The image has no curl, and bash speaks TCP.
# Without HOST and PORT it is the listener of this container's own role: the worker's in the role `worker`.
set -u
path="${1:-/readyz}"
if [ "${COAR_ROLE:-all}" = worker ]; then
    listen="${COAR_WORKER_LISTEN:-0.0.0.0:8081}"
else
    listen="${COAR_LISTEN:-127.0.0.1:8080}"
fi
host="${2:-127.0.0.1}"
port="${3:-${listen##*:}}"

exec 3<>"/dev/tcp/$host/$port" || exit 1
printf 'GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$path" "$host" >&3
# A server that hangs is not healthy either; the image's HEALTHCHECK waits longer than this.
IFS=' ' read -r -t 4 _ status _ <&3 || exit 1
if [ "$status" != 200 ]; then
    echo "$path answers $status" >&2
    exit 1
fi
