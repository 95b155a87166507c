#!/usr/bin/env bash
# What HTTP costs beside the engine, on a real server with a data folder of its own: /livez while the device is busy,
# requests beside their drawing, idle event streams, refusals of a full queue. JSON and a table; Python's standard library.
# Usage: benches/http/run.sh [--seconds N] [--streams N] [--out FILE] [PART...]; parts: livez overhead streams refusals
# COAR names the binary (default: target/release/coar).
set -euo pipefail
cd "$(dirname "$0")/../.."
# Each stream is a descriptor here and one there.
ulimit -n 8192
exec python3 benches/http/bench.py --coar "${COAR:-target/release/coar}" "$@"
