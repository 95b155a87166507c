#!/usr/bin/env bash
# Tests scripts/gpu-check.sh without a GPU: packs the program, then runs it in a copy of the tracked files, as on the machine that
# it is carried to. If COAR_BIN is set, it is packed instead of the built program.
# shellcheck disable=SC2016  # the stand-ins' bodies are expanded when they run
set -euo pipefail
cd "$(dirname "$0")/../.."
libtorch=$(realpath "${LIBTORCH:-.libtorch/torch}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
copy=$work/copy
check=$copy/scripts/gpu-check.sh

fail() {
    echo "FAILED  $1" >&2
    shift
    [ $# -eq 0 ] || tail -n 40 "$@" >&2
    exit 1
}
pass() { echo "ok      $1"; }
# has FILE TEXT...: every text is in the file.
has() {
    local file=$1 text
    shift
    for text in "$@"; do grep -qF -- "$text" "$file" || fail "\`$text\` is missing in:" "$file"; done
}
# refuses NAME TEXT... -- COMMAND: the command fails, and prints every text.
refuses() {
    local name=$1 texts=()
    shift
    while [ "$1" != -- ]; do texts+=("$1"); shift; done
    shift
    if "$@" >"$work/refusal" 2>&1; then fail "$name: was accepted" "$work/refusal"; fi
    has "$work/refusal" "${texts[@]}"
    pass "$name"
}
# stand_in BODY: writes a program to $work/stand-in, for the cases that test only the script. $out is the report's folder.
stand_in() {
    {
        echo '#!/usr/bin/env bash'
        echo 'while [ $# -gt 0 ]; do [ "$1" != --out ] || out=$2; shift; done'
        echo 'echo "{\"event\": \"begin\", \"part\": \"env\"}" >"$out/report.jsonl"'
        echo "$1"
    } >"$work/stand-in"
    chmod +x "$work/stand-in"
}

git ls-files -z | xargs -0 cp --parents -t "$(mkdir -p "$copy" && echo "$copy")"
# The script under test, committed or not.
cp scripts/gpu-check.sh "$copy/scripts/"
mkdir "$copy/.libtorch"
ln -s "$libtorch" "$copy/.libtorch/torch"
unset LIBTORCH OUT PYTHON
# pack uses the caller's COAR_BIN; run must use the packed program.
pack() { scripts/gpu-check.sh pack --dry-run --out "$copy/.gpu"; }
run=(env --unset=COAR_BIN "$check" run)

pack >"$work/packed" 2>&1 || fail "pack" "$work/packed"
has "$work/packed" coar-lab.xz manifest.txt "in all"
has "$copy/.gpu/manifest.txt" version= build= commit= libtorch=2. sha256=
cp -r "$copy/.gpu" "$work/good"
pass "pack: $(grep 'in all' "$work/packed" | tr -s ' ')"

# From another folder, with the caller's own LD_LIBRARY_PATH, without a GPU.
(cd / && LD_LIBRARY_PATH=/caller/lib "${run[@]}" --dry-run --seconds 240 --out "$work/report") >"$work/table" 2>"$work/messages" ||
    fail "run" "$work/messages" "$work/table"
[ -s "$work/report/report.jsonl" ] || fail "run: there is no report.jsonl" "$work/messages"
[ -s "$work/table" ] && [ "$(wc -l <"$work/table")" -le 30 ] || fail "run: no table, or one of more than 30 lines" "$work/table"
has "$work/report/log.txt" "sha256 checked" "$(tail -n 1 "$work/table")"
for part in env parity decode image train concepts soak faults serve load micro; do
    grep -q "\"part\": *\"$part\"" "$work/report/report.jsonl" || fail "run: the report has no part $part" "$work/table"
done
pass "run: every part, a table of $(wc -l <"$work/table") lines, $(find "$work/report" -type f | wc -l) files"

# The program's environment and output.
stand_in 'for line in $(seq 35); do echo "row $line"; done; echo "LD_LIBRARY_PATH=$LD_LIBRARY_PATH"'
(cd "$work" && LD_LIBRARY_PATH=/caller/lib:/driver COAR_BIN=stand-in "$check" run --dry-run --out relative --parts env --tf32) >"$work/table" 2>"$work/messages" ||
    fail "arguments" "$work/messages"
[ "$(tail -n 1 "$work/table")" = "LD_LIBRARY_PATH=$copy/.libtorch/torch/lib:/caller/lib:/driver" ] ||
    fail "LD_LIBRARY_PATH is not the caller's with libtorch before it" "$work/table"
[ "$(wc -l <"$work/table")" = 30 ] || fail "more than 30 lines are printed" "$work/table"
has "$work/relative/log.txt" "row 1" "--device cpu --small --seconds 500 --out $work/relative --parts env --tf32"
pass "LD_LIBRARY_PATH is extended, arguments are passed on"

# A PyTorch folder with its neighbouring packages, without loadable libraries.
torch() {
    rm -rf "$work/site"
    mkdir -p "$work/site/torch/lib" "$work/site/nvidia/cu13/lib"
    touch "$work/site/torch/__init__.py" "$work/site/torch/lib/libtorch_cpu.so" "$work/site/nvidia/cu13/lib/libnvrtc.so.13"
    echo "__version__ = '$1'" >"$work/site/torch/version.py"
}
torch 2.11.1+cu130
touch "$work/site/torch/lib/libtorch_cuda.so"
stand_in 'echo "LD_LIBRARY_PATH=$LD_LIBRARY_PATH"'
PYTHONPATH=$work/site LD_LIBRARY_PATH=/driver COAR_BIN=$work/stand-in OUT=$work/out "$check" run >"$work/table" 2>"$work/messages" || fail "PyTorch" "$work/messages"
has "$work/table" "LD_LIBRARY_PATH=$work/site/torch/lib:$work/site/nvidia/cu13/lib:/driver"
has "$work/out/log.txt" "--device cuda:0 --shape 7b --target-size 768 --seconds 500"
pass "libtorch and NVRTC of the installed PyTorch, the report in \$OUT"

sed -i 's/^build=.*/build=release/' "$copy/.gpu/manifest.txt"
torch 2.9.1+cu128
refuses "another PyTorch" "2.9.1+cu128" "2.11.0" "2.11.x" "$work/site/torch" -- env PYTHONPATH="$work/site" "${run[@]}" --out "$work/refused"
torch 2.11.0+cpu
refuses "a PyTorch without CUDA" "2.11.0+cpu" libtorch_cuda.so -- env PYTHONPATH="$work/site" "${run[@]}" --out "$work/refused"
printf '#!/bin/sh\nexec python3 -I -S "$@"\n' >"$work/bare-python"
chmod +x "$work/bare-python"
refuses "no PyTorch" "has no PyTorch" "torch==2.11.0" -- env PYTHON="$work/bare-python" "${run[@]}" --out "$work/refused"

sed -i 's/^build=.*/build=debug/' "$copy/.gpu/manifest.txt"
refuses "a debug build on a GPU" "debug build" -- "${run[@]}" --out "$work/refused"
cp "$work/good/manifest.txt" "$copy/.gpu/"

archive=$copy/.gpu/coar-lab.xz
printf 'damaged' | dd of="$archive" bs=1 seek=$(($(stat -c %s "$archive") / 2)) conv=notrunc status=none
refuses "a damaged archive" "damaged" "pack it again" -- "${run[@]}" --dry-run --out "$work/refused"
cp "$work/good/coar-lab.xz" "$archive"
truncate -s $(($(stat -c %s "$archive") / 2)) "$archive"
refuses "half an archive" "damaged" "pack it again" -- "${run[@]}" --dry-run --out "$work/refused"
python3 -c 'import lzma, sys; lzma.open(sys.argv[1], "wb").write(b"another program")' "$archive"
refuses "another program" "sha256" "pack it again" -- "${run[@]}" --dry-run --out "$work/refused"
rm "$archive"
refuses "nothing packed" "gpu-check.sh pack" -- "${run[@]}" --dry-run --out "$work/refused"
[ ! -e "$work/refused/report.jsonl" ] || fail "a refused run has begun"

cp "$work/good"/* "$copy/.gpu/"
truncate -s 41M "$copy/.gpu/weights.bin"
refuses "more than 40 MiB" "weights.bin" "at most 40 MiB" -- pack

# A program that hangs is killed; its report is kept.
stand_in 'echo "the part began" >&2; exec sleep 600'
status=0
COAR_BIN=$work/stand-in GPU_CHECK_GRACE=1 "$check" run --dry-run --seconds 1 --out "$work/hung" >"$work/table" 2>"$work/messages" || status=$?
[ "$status" = 124 ] || fail "a program that hangs: status $status" "$work/messages"
has "$work/messages" "the part began" "ended by force"
has "$work/hung/log.txt" "the part began"
has "$work/table" "env" "begun, not ended"
[ -s "$work/hung/report.jsonl" ] || fail "the report of a program that hangs is lost"
pass "a program that hangs is ended, its report stays"
refuses "a folder that holds a report" "holds a report already" -- env COAR_BIN="$work/stand-in" "$check" run --dry-run --out "$work/hung"

stand_in 'mkdir -p "$out/a/b"; touch "$out/a b" "$out/"{1..8}; echo done'
refuses "a report that cannot be carried" "11 files" "a/b is too deep" "not a plain name: a b" -- env COAR_BIN="$work/stand-in" "$check" run --dry-run --out "$work/many"
