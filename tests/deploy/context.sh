#!/usr/bin/env bash
# Copies the tracked files that .dockerignore admits into a folder: context.sh FOLDER. It only supports the form of this
# repository's .dockerignore: `*` first, then the admitted paths.
set -euo pipefail
cd "$(dirname "$0")/../.."
grep -vE '^(#|$)' .dockerignore | head -1 | grep -qx '\*' || { echo ".dockerignore does not begin with *" >&2; exit 1; }
mkdir -p "$1"
grep -vE '^(#|$)' .dockerignore | tail -n +2 | while IFS= read -r line; do
    path="${line#!}"
    [ "$path" != "$line" ] || { echo ".dockerignore: $line is no exception" >&2; exit 1; }
    [ -e "$path" ] || { echo ".dockerignore: $path does not exist" >&2; exit 1; }
    git ls-files -z -- "$path" | xargs -0 cp --parents -t "$1"
done
