#!/usr/bin/env bash
# One tenant at its worst beside another that works: docs/howto/neighbours.md. SECONDS (60) for each attack, ONLY (names of attacks, with
# commas), MODES (sqlite,cluster,keyless), SERVE (options of the servers; `--rows 2`), DISK (MiB that the attacker may add where the
# server has no quota of bytes; 256), KEEP=1. Needs Python 3.10; for `cluster` PostgreSQL, for `keyless` Chromium. COAR_BIN names
# another binary than target/debug/coar. What a machine lacks is left out and said so (SKIPPED); with COAR_NEED_POSTGRES=1 and
# COAR_NEED_CHROMIUM=1 that fails.
set -euo pipefail
cd "$(dirname "$0")/../.."

modes=${MODES:-sqlite,cluster,keyless}
[ -n "${COAR_BIN:-}" ] || scripts/build-for-tests.sh --quiet
export COAR_BIN=${COAR_BIN:-$PWD/target/debug/coar}
failed=0

measured=()
for mode in sqlite cluster; do
    case ",$modes," in *",$mode,"*) measured+=("$mode") ;; esac
done
if [[ " ${measured[*]:-} " == *" cluster "* ]] && ! ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql) >/dev/null 2>&1 || true
    fi
    if ! ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1; then
        echo "SKIPPED, cluster: PostgreSQL is not installed (Debian: apt-get install postgresql)" >&2
        [ -z "${COAR_NEED_POSTGRES:-}" ] || failed=1
        measured=("${measured[@]/cluster/}")
    fi
fi
for mode in "${measured[@]:-}"; do
    [ -z "$mode" ] || python3 tests/neighbours/main.py "$mode" || failed=1
done

case ",$modes," in
*,keyless,*)
    chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
    if [ -z "$chromium" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 || true
        chromium=$(command -v chromium || true)
    fi
    if [ -z "$chromium" ]; then
        echo "SKIPPED, keyless: there is no chromium, chromium-browser or google-chrome" >&2
        [ -z "${COAR_NEED_CHROMIUM:-}" ] || failed=1
    else
        scripts/venv.sh target/ui-venv tests/ui/requirements.txt
        target/ui-venv/bin/python tests/neighbours/hostile.py "$chromium" || failed=1
    fi
    ;;
esac
exit $failed
