#!/usr/bin/env bash
# Tests the page in a real browser against the built server. Screenshots are written to target/ui.
#   tests/ui/run.sh              builds the server if there is none, starts it, runs the whole flow
#   tests/ui/run.sh --url URL    against a running server (its data is changed)
set -euo pipefail
cd "$(dirname "$0")/../.."

if command -v node >/dev/null; then
  node --test tests/ui/*.test.mjs
else
  echo "tests/ui: node is missing; the page's pure functions are not tested alone" >&2
fi

find_chromium() {
  for name in chromium chromium-browser google-chrome; do
    command -v "$name" && return 0
  done
  return 1
}
if ! find_chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null || true
fi
if ! CHROMIUM=$(find_chromium); then
  echo "tests/ui: there is no chromium, chromium-browser or google-chrome: THE PAGE IS NOT TESTED." >&2
  echo "SKIPPED"
  exit 0
fi

VENV=target/ui-venv
scripts/venv.sh "$VENV" tests/ui/requirements.txt

SERVER=${COAR_BIN:-target/debug/coar}
case " $* " in
  *" --url "*) ;;
  *) [ -n "${COAR_BIN:-}" ] || scripts/build-for-tests.sh ;;
esac
exec "$VENV/bin/python" tests/ui/studio.py --chromium "$CHROMIUM" --server "$SERVER" "$@"
