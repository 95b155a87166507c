#!/bin/sh
# Builds target/debug/coar and coar-lab for the suites in tests/, with the features that `make test` selects, so that nothing is
# compiled twice.
set -eu
cd "$(dirname "$0")/.."
exec cargo build "$@" --workspace --bins --features coar/fuzzing
