#!/usr/bin/env bash
# Trains the pocket model of the designers' world on a GPU machine that has nothing to build with: tokenizer, transformer and
# decoder, one after the other, each in its share of the time.
#
#   scripts/gpu-world.sh pack
#   scripts/gpu-world.sh run [--seconds N] [--out DIR]
#   coar-lab pocket designers unbundle DIR             back on the machine that goes on with it
#
# pack  packs the program as scripts/gpu-check.sh does, and the drawings beside it in .gpu (`coar-lab pocket designers draw` has
#       to have rendered them).
# run   unpacks them and trains for N seconds in all (default 800). What was trained is in DIR (default $OUT, or
#       target/gpu-world) after every stage: at most 8 files of at most 16 MB, and log.txt. Needed: bash, coreutils, Python 3
#       with PyTorch.
#
# Variables: PYTHON, the Python whose PyTorch is used (default python3); WORLD_DEVICE (default cuda:0).
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Percentage of the time for each stage's training; the rest is for loading and saving.
tokenizer_share=53
transformer_share=31
decoder_share=11

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
die() {
    echo "error: $*" >&2
    exit 1
}

pack() {
    local drawings=${XDG_CACHE_HOME:-$HOME/.cache}/coar/world/drawings.zip
    [ -f "$drawings" ] || die "$drawings is missing; run scripts/fetch-drawings.sh and coar-lab pocket designers draw first"
    mkdir -p .gpu
    cp "$drawings" .gpu/drawings.zip
    scripts/gpu-check.sh pack
}

run() {
    local seconds=800 out=${OUT:-target/gpu-world}
    while [ $# -gt 0 ]; do
        case $1 in
            --seconds) seconds=${2:?--seconds needs a number}; shift ;;
            --out) out=${2:?--out needs a folder}; shift ;;
            *) die "run has no argument \`$1\`" ;;
        esac
        shift
    done
    case $seconds in '' | *[!0-9]*) die "--seconds is \`$seconds\`; expected a whole number of seconds" ;; esac
    [ "$seconds" -ge 60 ] || die "--seconds is $seconds; at least 60 are needed"
    [ -f .gpu/coar-lab.xz ] && [ -f .gpu/drawings.zip ] || die ".gpu holds no packed program or no drawings; run scripts/gpu-world.sh pack first"
    mkdir -p "$out"
    local python=${PYTHON:-python3} program=$work/coar-lab torch sha
    "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' .gpu/coar-lab.xz "$program"
    sha=$(sha256sum "$program" | cut -d ' ' -f 1)
    [ "$sha" = "$(sed -n 's/^sha256=//p' .gpu/manifest.txt)" ] || die ".gpu/coar-lab.xz is not the program of .gpu/manifest.txt; pack it again"
    chmod +x "$program"
    torch=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")')
    [ -n "$torch" ] || die "$python has no PyTorch"
    export LD_LIBRARY_PATH=$torch/lib:$torch/../nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    local world=$work/world
    mkdir -p "$world"
    cp .gpu/drawings.zip "$world/"
    stage "$program" "$world" "$out" tokenizer $((seconds * tokenizer_share / 100))
    stage "$program" "$world" "$out" transformer $((seconds * transformer_share / 100)) --from tokenizer
    stage "$program" "$world" "$out" decoder $((seconds * decoder_share / 100)) --from tokenizer
    "$program" pocket designers measure --dir "$world" --run decoder --device "${WORLD_DEVICE:-cuda:0}" | tee -a "$out/log.txt"
}

# stage PROGRAM WORLD OUT NAME SECONDS [ARGUMENTS]
stage() {
    local program=$1 world=$2 out=$3 name=$4 seconds=$5 status=0
    shift 5
    timeout $((seconds + 60)) "$program" pocket designers train "$name" "$@" --dir "$world" --device "${WORLD_DEVICE:-cuda:0}" \
        --seconds "$seconds" --fit >"$work/log" 2>&1 || status=$?
    cat "$work/log" >>"$out/log.txt"
    echo "$name: status $status"
    tail -n 3 "$work/log" | cut -c 1-400
    "$program" pocket designers bundle --dir "$world" --out "$out" >/dev/null
    [ "$status" -eq 0 ] || die "$name ended with status $status; what it has saved is in $out"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    pack) pack "$@" ;;
    run) run "$@" ;;
    *)
        sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
