#!/usr/bin/env bash
# Tests the build without the feature `device`: it is not linked to libtorch, reports an error if a device is needed, passes
# the server's unit tests, and serves in the role `api` with a worker (skipped with a message if there is no PostgreSQL).
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
export COAR_DATA
COAR_DATA=$(mktemp -d)
trap 'rm -rf "$COAR_DATA"' EXIT

tree=$(cargo tree -p coar --no-default-features -e normal)
! grep -E '\b(tch|torch-sys) v' <<<"$tree"
core=$(cargo tree -p coar-core -e normal -f '{p} {f}')
! grep -E '\b(tch|torch-sys|sqlx|axum) v|tokio v.*\brt\b' <<<"$core"

# Builds in the same target folder, to share dependencies; the full program is rebuilt at the end.
cargo test --quiet -p coar -p coar-registry --no-default-features --lib
cargo build --quiet -p coar --no-default-features
program=$target/api-build/coar
mkdir -p "$target/api-build"
cp "$target/debug/coar" "$program"
scripts/build-for-tests.sh --quiet
! ldd "$program" | grep -i torch
for role in all worker; do
    ! "$program" serve --role "$role" --listen 127.0.0.1:0 --worker-listen 127.0.0.1:0 2>"$COAR_DATA/said"
    grep -q "has no device" "$COAR_DATA/said"
done
! "$program" generate "a cat" 2>"$COAR_DATA/said"
grep -q "has no device" "$COAR_DATA/said"
echo "ok    a build without the device is free of libtorch, and says what it cannot do"

scripts/with-postgres.sh python3 tests/api_build/serve.py "$program" "${COAR_BIN:-$target/debug/coar}"
