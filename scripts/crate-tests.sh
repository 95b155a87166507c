#!/usr/bin/env bash
# scripts/crate-tests.sh CRATE [ARGUMENT...]: runs the unit tests of one crate, as `make test` builds them. `cargo test -p CRATE` selects
# fewer features of shared dependencies, and so recompiles them.
set -euo pipefail
cd "$(dirname "$0")/.."
crate=$1
shift
binary=$(cargo test --workspace --lib --no-run --message-format=json | python3 -c '
import json, os, sys
for line in sys.stdin:
    built = json.loads(line)
    if built.get("executable") and "lib" in built["target"]["kind"] and built["target"]["name"] == sys.argv[1].replace("-", "_"):
        print(os.path.dirname(built["manifest_path"]), built["executable"])
' "$crate")
[ -n "$binary" ] || { echo "error: the workspace has no crate \`$crate\`" >&2; exit 1; }
cd "${binary%% *}"
exec "${binary#* }" "$@"
