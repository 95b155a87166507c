#!/usr/bin/env bash
# Runs every check of docker/ that needs neither a container engine nor a cluster, and lists the skipped ones.
# Tools are Python packages in target/deploy-venv; promtool is from Debian's package `prometheus`, if it is installed.
# With NO_SKIP=1 a skipped check is a failure.
set -euo pipefail
cd "$(dirname "$0")/../.."
work="$(mktemp -d)"
children=()
finish() {
    for child in "${children[@]:-}"; do
        [ -z "$child" ] || kill "$child" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap finish EXIT
passed=0 skipped=0
pass() { passed=$((passed + 1)); echo "ok       $*"; }
skip() { skipped=$((skipped + 1)); echo "SKIPPED  $*"; }
fail() { echo "FAILED   $*" >&2; exit 1; }

venv=target/deploy-venv
if ! scripts/venv.sh "$venv" tests/deploy/requirements.txt; then
    echo "SKIPPED  the tools cannot be installed: NOTHING IN docker/ IS CHECKED" >&2
    [ "${NO_SKIP:-0}" != 1 ]
    exit
fi
PATH="$PWD/$venv/bin:$PATH"

# ---- scripts and files
shellcheck docker/*.sh scripts/*.sh tests/deploy/*.sh tests/gpu_check/*.sh tests/pgbouncer/*.sh tests/proxy/*.sh
pass "shellcheck"
hadolint docker/Dockerfile
pass "hadolint"
yamllint -s -c tests/deploy/.yamllint docker/*.y*ml docker/grafana docker/helm/coar/values.yaml docker/helm/coar/Chart.yaml tests/deploy/*.yml
pass "yamllint"

# ---- the compose file
check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml > "$work/compose.txt" || { cat "$work/compose.txt"; exit 1; }
pass "compose file against the compose specification"
python tests/deploy/compose.py . "$work" > "$work/compose.txt" || { cat "$work/compose.txt"; exit 1; }
while IFS= read -r line; do
    case "$line" in SKIPPED:*) skip "${line#SKIPPED: }" ;; *) pass "$line" ;; esac
done < "$work/compose.txt"
if docker compose version > /dev/null 2>&1; then
    docker/env.sh "$work/env" 2> /dev/null
    docker compose --env-file "$work/env" -f docker/compose.yaml --profile gpu config --quiet
    pass "docker compose config"
else
    skip "docker compose config: no docker with compose here"
fi

# ---- the chart
python tests/deploy/chart.py docker/helm/coar > "$work/chart.txt" || { cat "$work/chart.txt"; exit 1; }
pass "$(cat "$work/chart.txt")"

# ---- Prometheus
if command -v promtool > /dev/null; then
    cp docker/alerts.yml tests/deploy/alerts_test.yml "$work/"
    sed "s#/etc/prometheus/#$work/#" docker/prometheus.yml > "$work/prometheus.yml"
    promtool check config "$work/prometheus.yml" > "$work/promtool.txt" 2>&1 || { cat "$work/promtool.txt"; exit 1; }
    promtool check rules "$work/rules.yml" > "$work/promtool.txt" 2>&1 || { cat "$work/promtool.txt"; exit 1; }
    promtool test rules "$work/alerts_test.yml" > "$work/promtool.txt" 2>&1 || { cat "$work/promtool.txt"; exit 1; }
    pass "promtool: configuration, every expression of the dashboard, the alarms ring when they should"
else
    skip "promtool: not installed (Debian: apt-get install prometheus)"
fi

# ---- the systemd unit
if command -v systemd-analyze > /dev/null; then
    # The program need not be installed here.
    sed 's#^ExecStart=[^ ]*#ExecStart=/bin/true#' docker/coar.service > "$work/coar.service"
    systemd-analyze verify --man=no "$work/coar.service" > "$work/unit.txt" 2>&1 || { cat "$work/unit.txt"; exit 1; }
    [ ! -s "$work/unit.txt" ] || fail "systemd-analyze verify: $(cat "$work/unit.txt")"
    # The threshold is in tenths of systemd's score, which is 9.6 for a unit without hardening.
    systemd-analyze security --offline=true --threshold=20 --no-pager "$work/coar.service" > "$work/unit.txt" 2>&1 ||
        fail "systemd-analyze security: $(tail -1 "$work/unit.txt")"
    pass "the systemd unit: $(tail -1 "$work/unit.txt" | sed 's/^[^O]*//')"
else
    skip "the systemd unit: no systemd-analyze here"
fi

# ---- the passwords
docker/env.sh "$work/passwords" 2> /dev/null
[ "$(stat -c %a "$work/passwords")" = 600 ] || fail "docker/env.sh: others may read the passwords"
[ "$(grep -c '=[0-9a-f]\{48\}$' "$work/passwords")" = 4 ] || fail "docker/env.sh: $(cat "$work/passwords")"
[ "$(grep -o '=.*' "$work/passwords" | sort -u | wc -l)" = 4 ] || fail "docker/env.sh: a password twice"
cp "$work/passwords" "$work/before"
docker/env.sh "$work/passwords" 2> /dev/null
cmp -s "$work/passwords" "$work/before" || fail "docker/env.sh: passwords that were there have changed"
pass "docker/env.sh"

# ---- the workers' entry point: it sets its own address, and passes its arguments on unchanged
mkdir "$work/bin"
cat > "$work/bin/coar" <<'STUB'
#!/bin/sh
echo "$COAR_ADVERTISE $# $2"
STUB
chmod +x "$work/bin/coar"
for service in worker worker-gpu; do
    python tests/deploy/entrypoint.py "$service" > "$work/entrypoint"
    mapfile -d '' -t entrypoint < "$work/entrypoint"
    told="$(PATH="$work/bin:$PATH" "${entrypoint[@]}" admin "two words")"
    [ "$told" = "http://$(hostname):8081 2 two words" ] || fail "entry point of $service: $told"
done
pass "the workers' entry point"

# ---- the health check, against a server that answers with the status in the path, and one that never answers
python3 tests/deploy/answer.py > "$work/ports" &
children+=($!)
until [ "$(wc -w < "$work/ports")" = 2 ]; do
    kill -0 "${children[0]}" || fail "tests/deploy/answer.py ended"
done
read -r port mute < "$work/ports"
healthy() { env "$1" docker/healthcheck.sh "${@:2}" 2> /dev/null; }
healthy "COAR_LISTEN=0.0.0.0:$port" /200 || fail "health check: 200 is healthy"
healthy "COAR_LISTEN=:$port" /200 || fail "health check: all addresses"
healthy "COAR_LISTEN=[::]:$port" /200 || fail "health check: an IPv6 address"
env COAR_ROLE=worker "COAR_WORKER_LISTEN=0.0.0.0:$port" COAR_LISTEN=0.0.0.0:1 docker/healthcheck.sh /200 || fail "health check: a worker"
docker/healthcheck.sh /200 127.0.0.1 "$port" || fail "health check: another host"
! healthy "COAR_LISTEN=0.0.0.0:$port" /503 || fail "health check: 503 is not healthy"
! healthy "COAR_LISTEN=0.0.0.0:$port" || fail "health check: /readyz is what is asked (it answers 404 here)"
! healthy COAR_LISTEN=0.0.0.0:1 /200 || fail "health check: nobody listens"
! healthy "COAR_LISTEN=0.0.0.0:$mute" /200 || fail "health check: a server that hangs is not healthy"
pass "health check: 200, 503, 404, nobody, a server that hangs, either role"

# ---- the build context is sufficient for cargo, and contains nothing private
tests/deploy/context.sh "$work/context"
(cd "$work/context" && cargo metadata --no-deps --offline --format-version 1 > /dev/null) || fail "the builder's context lacks something"
for private in data runs target .git .libtorch docker/.env; do
    [ ! -e "$work/context/$private" ] || fail "$private would be sent to the builder"
done
while IFS= read -r line; do
    file="$(sed -E 's/.*include_(bytes|str)!\(concat!\("([^"]*)".*/\2/' <<< "$line")"
    [ -e "$work/context/crates/coar-engine/src/$file" ] || fail "the builder's context lacks $file"
done < <(grep -rhoE 'include_bytes!\(concat!\("\.\./\.\./\.\./[^"]*"' crates/coar-engine/src)
pass "the builder's context: $(find "$work/context" -type f | wc -l) files, $(du -sh "$work/context" | cut -f1)"

skip "the images were not built, the compose file and the chart not started: that needs a container engine, a cluster, a GPU"
echo "deploy: $passed passed, 0 failed, $skipped skipped"
if [ "${NO_SKIP:-0}" = 1 ] && [ "$skipped" -gt 0 ]; then
    exit 1
fi
