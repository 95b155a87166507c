#!/usr/bin/env bash
# Checks the dependencies with deny.toml. Checks whose tool or database cannot be fetched are skipped with a message; with NO_SKIP=1
# that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=target/tools/bin/cargo-deny
skip() {
    echo "SKIPPED  $*" >&2
    [ "${NO_SKIP:-0}" != 1 ]
}
if [ ! -x "$tool" ]; then
    if ! cargo install --locked --root target/tools --target-dir target/tools/build --version 0.20.2 cargo-deny; then
        skip "cargo-deny could not be built: THE DEPENDENCIES ARE NOT CHECKED"
        exit
    fi
    rm -rf target/tools/build
fi
"$tool" --all-features check bans licenses sources
if "$tool" fetch db; then
    "$tool" --all-features check --disable-fetch advisories
else
    skip "advisories: the RustSec database could not be fetched"
fi
