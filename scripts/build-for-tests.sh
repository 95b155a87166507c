#!/bin/sh
# Builds target/debug/coar and coar-lab for the suites in tests/, with the features that `make test` selects: what it has compiled is
# not compiled again.
set -eu
cd "$(dirname "$0")/.."
exec cargo build "$@" --workspace --bins --features coar/fuzzing
