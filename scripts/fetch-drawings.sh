#!/bin/sh
# Fetches the designers' icon sets with the npm client, at pinned versions and hashes, into a folder outside the repository.
# Needs npm and sha256sum. Existing sets are kept. Usage: scripts/fetch-drawings.sh [FOLDER]
set -eu

dir="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/coar/world/icons}"
command -v npm >/dev/null 2>&1 || { echo "error: npm is needed to fetch the icon sets; install Node.js with npm and run again" >&2; exit 1; }
mkdir -p "$dir"
work="$(mktemp -d "$dir/.fetch.XXXXXX")"
trap 'rm -rf "$work"' EXIT

# set version sha256-of-the-package
while read -r set version hash; do
    [ -n "$set" ] || continue
    if [ "$(cat "$dir/$set/.sha256" 2>/dev/null || true)" = "$hash" ]; then
        echo "$set $version is there"
        continue
    fi
    echo "fetching $set $version"
    archive="$(cd "$work" && npm pack --silent "@iconify-json/$set@$version")"
    echo "$hash  $work/$archive" | sha256sum -c --quiet - || { echo "error: $set $version has another sha256 than the pinned $hash" >&2; exit 1; }
    mkdir "$work/$set"
    tar -xzf "$work/$archive" -C "$work/$set" --strip-components=1 package/icons.json package/info.json
    echo "$hash" > "$work/$set/.sha256"
    rm -rf "${dir:?}/$set"
    mv "$work/$set" "$dir/$set"
done <<'SETS'
noto 1.2.9 3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad
noto-v1 1.2.5 2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37
fluent-emoji-flat 1.2.6 7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175
twemoji 1.2.5 19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7
emojione 1.2.3 26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e
fxemoji 1.2.2 f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef
openmoji 1.2.29 03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5
streamline-emojis 1.2.4 5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc
SETS
echo "icon sets are in $dir"
