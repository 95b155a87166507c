#!/usr/bin/env bash
# Installs the libtorch that Cargo.toml is pinned to, once per machine, and links it as .libtorch.
# The Linux wheel is the CUDA build; on the CPU it needs only two additional small CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."
version=2.11.0
grep -q "^torch==$version " scripts/libtorch-cpu.txt || { echo "error: scripts/libtorch-cpu.txt has no hashes of torch $version" >&2; exit 1; }
cache="${COAR_LIBTORCH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coar/libtorch-$version}"
if [ -n "${LIBTORCH:-}" ] && [ -e "$LIBTORCH/lib/libtorch_cpu.so" ]; then
    echo "using the libtorch at LIBTORCH=$LIBTORCH; it must be $version"
    exit 0
fi
if [ ! -e "$cache/torch/lib/libtorch_cpu.so" ]; then
    echo "installing libtorch $version into $cache (about 500 MB to fetch, 1.2 GB on disk)"
    python3 -m pip --version >/dev/null 2>&1 || { echo "error: python3 with pip is needed to fetch libtorch; install it (Debian: apt-get install python3-pip) and run again" >&2; exit 1; }
    mkdir -p "$(dirname "$cache")"
    partial="$(mktemp -d "$cache.partial.XXXXXX")"
    trap 'rm -rf "$partial"' EXIT
    python3 -m pip install --quiet --disable-pip-version-check --no-compile --root-user-action=ignore --target "$partial" --no-deps \
        --only-binary=:all: --require-hashes --requirement scripts/libtorch-cpu.txt
    rm -rf "$cache"
    mv -T "$partial" "$cache"
    trap - EXIT
fi
rm -rf .libtorch
ln -s "$cache" .libtorch
