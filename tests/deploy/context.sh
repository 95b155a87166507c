#!/usr/bin/env bash
# Copies what .dockerignore lets through of the tracked files into a folder: context.sh FOLDER. It knows the form that our
# .dockerignore has: `*` first, then paths that are let through.
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
