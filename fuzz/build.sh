#!/usr/bin/env bash
# Builds the fuzzer, and writes the seeds. See docs/fuzzing.md.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p target
cc -c -fPIC -O1 -o target/stub.o stub.c
export RUSTC_WRAPPER=$PWD/rustc.sh COAR_FUZZ_STUB=$PWD/target/stub.o
cargo build --locked --bins
LD_LIBRARY_PATH=$PWD/../.libtorch/torch/lib target/debug/seeds
