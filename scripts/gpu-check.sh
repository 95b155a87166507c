#!/usr/bin/env bash
# The GPU check: packs coar-lab for a machine that has a GPU and nothing to build with, and runs `coar-lab bench device` there.
#
#   scripts/gpu-check.sh pack [--out DIR] [--dry-run]
#   scripts/gpu-check.sh run [--seconds N] [--out DIR] [--dry-run] [ARGUMENTS OF coar-lab bench device]
#
# pack  strips and compresses target/release/coar-lab (built first if it is missing) into DIR (default .gpu, ignored by git),
#       and lists what has to be carried beside the tracked files: at most 40 MiB.
# run   unpacks the program, finds the libtorch and the NVRTC of the installed PyTorch, runs every part of the check in
#       order of importance for at most N seconds (default 500), and prints the program's table last. The report goes to
#       DIR (default $OUT, or target/gpu-check): report.jsonl, log.txt and a few images. Needed: bash, coreutils, Python 3
#       with PyTorch. Not needed: Rust, a network, xz.
# --dry-run does the same without a GPU: it packs a debug build where there is no release build, and runs
#       `coar-lab bench device --device cpu --small` with the libtorch that the build uses.
#
# Variables: PYTHON, the Python whose PyTorch is used (default python3); LIBTORCH, a PyTorch folder to use instead;
# COAR_BIN, a program to pack, or to run in place of the packed one; GPU_CHECK_GRACE, how many seconds after N the program
# is ended (default 30).
set -Eeuo pipefail

invoked=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
parts=env,parity,decode,image,train,concepts,soak,faults,serve,load,micro
carried_limit=$((40 << 20))
files_limit=8
table_lines=30

log=
work=$(mktemp -d)
child=
cleanup() {
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'echo "error: line $LINENO of scripts/gpu-check.sh: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT
trap 'exit 143' TERM

usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "$root/scripts/gpu-check.sh"; }

# Prints to standard error and, once there is one, to the log. Standard output is only for the table.
note() {
    printf '%s\n' "$*" >&2
    [ -z "$log" ] || printf '%s\n' "$*" >>"$log"
}
die() {
    note "error: $*"
    exit 1
}

# Resolves a path relative to the caller's working directory.
absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$invoked/$1" ;;
    esac
}
python=${PYTHON:-python3}
case $python in */*) python=$(absolute "$python") ;; esac
[ -z "${LIBTORCH:-}" ] || LIBTORCH=$(absolute "$LIBTORCH")
sha256() { sha256sum "$1" | cut -d ' ' -f 1; }
megabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f MB", bytes / 1e6 }'; }
# field KEY FILE: a value of the manifest.
field() { sed -n "s/^$1=//p" "$2" 2>/dev/null || true; }
has_lzma() { "$python" -c 'import lzma' 2>/dev/null; }
is_elf() { [ "$(head -c 4 "$1" | tail -c 3)" = ELF ]; }

# The version in a PyTorch folder's version.py.
version_of() { sed -n "s/^__version__ *= *['\"]\([^'\"]*\)['\"].*/\1/p" "$1/version.py" 2>/dev/null || true; }
# The version that the build is pinned to.
pinned() { sed -n 's/^version=//p' scripts/install-libtorch.sh; }

compress() {
    if command -v xz >/dev/null; then
        xz -6 -T0 --stdout "$1" >"$2"
    elif has_lzma; then
        "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(open(sys.argv[1], "rb"), lzma.open(sys.argv[2], "wb", preset=6))' "$1" "$2"
    else
        die "xz is missing and $python has no lzma module; install one of them (Debian: apt-get install xz-utils)"
    fi
}

decompress() {
    if has_lzma; then
        "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$1" "$2" 2>"$work/unpacking"
    elif command -v xz >/dev/null; then
        xz --decompress --stdout "$1" >"$2" 2>"$work/unpacking"
    else
        die "$python has no lzma module and xz is missing; one of them is needed to unpack $1"
    fi || die "$1 is damaged and cannot be unpacked ($(tail -n 1 "$work/unpacking")); pack it again"
}

# unpack DIR: unpacks the program to $work/coar-lab and checks that it is the packed one.
unpack() {
    [ -f "$1/coar-lab.xz" ] && [ -f "$1/manifest.txt" ] || die "$1 holds no packed program; run scripts/gpu-check.sh pack first"
    decompress "$1/coar-lab.xz" "$work/coar-lab"
    local found expected
    found=$(sha256 "$work/coar-lab")
    expected=$(field sha256 "$1/manifest.txt")
    [ "$found" = "$expected" ] ||
        die "$1/coar-lab.xz is not the program of $1/manifest.txt: its sha256 is $found, expected $expected; pack it again"
    chmod +x "$work/coar-lab"
}

pack() {
    local out=$root/.gpu dry_run=
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=$(absolute "${2:?--out needs a folder}"); shift ;;
            --out=*) out=$(absolute "${1#*=}") ;;
            --dry-run) dry_run=yes ;;
            *) die "pack has no argument \`$1\`; see scripts/gpu-check.sh --help" ;;
        esac
        shift
    done
    local target=${CARGO_TARGET_DIR:-target} build=release newer
    local built=${COAR_BIN:-$target/release/coar-lab}
    if [ ! -x "$built" ] && [ -n "$dry_run" ]; then
        build=debug
        built=$target/debug/coar-lab
        [ -x "$built" ] || scripts/build-for-tests.sh >&2
    fi
    [ -x "$built" ] || make --no-print-directory build-lab >&2
    [ -x "$built" ] || die "$built is missing after the build"
    newer=$(find src crates Cargo.toml Cargo.lock build.rs -newer "$built" -print -quit)
    [ -z "$newer" ] || [ -n "${COAR_BIN:-}" ] || note "warning: $newer is newer than $built; run make build-lab first to pack the present state"
    command -v strip >/dev/null || die "strip is missing; install binutils"

    mkdir -p "$out"
    local source_sha sha libtorch commit
    source_sha=$(sha256 "$built")
    libtorch=$(version_of "${LIBTORCH:-.libtorch/torch}")
    commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
    [ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || commit=$commit-dirty
    if [ "$(field source_sha256 "$out/manifest.txt")" = "$source_sha" ] &&
        [ -f "$out/coar-lab.xz" ] && [ "$(field archive_sha256 "$out/manifest.txt")" = "$(sha256 "$out/coar-lab.xz")" ]; then
        note "$out/coar-lab.xz is up to date"
        sha=$(field sha256 "$out/manifest.txt")
    else
        rm -f "$out/manifest.txt"
        strip -o "$work/stripped" "$built" || die "$built cannot be stripped; is it a program?"
        compress "$work/stripped" "$out/coar-lab.xz"
        sha=$(sha256 "$work/stripped")
    fi
    {
        echo "version=$("$built" --version | head -n 1)"
        echo "build=$build"
        echo "commit=$commit"
        echo "libtorch=${libtorch:-$(pinned)}"
        echo "sha256=$sha"
        echo "archive_sha256=$(sha256 "$out/coar-lab.xz")"
        echo "source_sha256=$source_sha"
    } >"$work/manifest"
    mv "$work/manifest" "$out/manifest.txt"
    unpack "$out"
    list_carried "$out"
}

# Lists the files to carry: everything in the folder.
list_carried() {
    local total
    echo "program: $(field version "$1/manifest.txt"), $(field build "$1/manifest.txt") build, commit $(field commit "$1/manifest.txt"), libtorch $(field libtorch "$1/manifest.txt")"
    echo "carried beside the tracked files, in $1:"
    find "$1" -type f -printf '%s %P\n' | sort -k 2 | awk '{ size = $1; sub(/^[0-9]+ /, ""); printf "  %8.2f MB  %s\n", size / 1e6, $0 }'
    total=$(find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
    awk -v bytes="$total" 'BEGIN { printf "  %8.2f MB  in all\n", bytes / 1e6 }'
    [ "$total" -le "$carried_limit" ] ||
        die "$1 holds $(megabytes "$total"); at most $((carried_limit >> 20)) MiB ($(megabytes "$carried_limit")) can be carried. Remove what does not belong there"
}

# find_torch DRY_RUN: sets torch (a folder) and torch_version.
find_torch() {
    torch=${LIBTORCH:-}
    [ -n "$torch" ] || [ -z "$1" ] || torch=$root/.libtorch/torch
    if [ -z "$torch" ]; then
        # Located without an import, which takes seconds and needs every library.
        torch=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s and s.origin else "")' 2>/dev/null || true)
    fi
    [ -n "$torch" ] || die "$python has no PyTorch; install it ($python -m pip install torch==$wanted) or name another Python with PYTHON"
    torch_version=$(version_of "$torch")
    [ -n "$torch_version" ] || die "$torch holds no version.py of PyTorch; name a PyTorch folder with LIBTORCH, or a Python with PYTHON"
    local series=${wanted%.*}
    case $torch_version in
        "$series".*) ;;
        *) die "PyTorch at $torch is version $torch_version; coar was built with libtorch $wanted and needs $series.x" ;;
    esac
    [ -e "$torch/lib/libtorch_cpu.so" ] || die "$torch/lib has no libtorch_cpu.so; is it a PyTorch for Linux?"
    [ -n "$1" ] || [ -e "$torch/lib/libtorch_cuda.so" ] ||
        die "PyTorch $torch_version at $torch has no CUDA part (libtorch_cuda.so); install the CUDA build of $wanted"
}

# Sets nvrtc: the folder of PyTorch's own copy, or of an installed toolkit.
find_nvrtc() {
    local folder
    nvrtc=
    for folder in "$torch"/../nvidia/cu13/lib "$torch"/../nvidia/cuda_nvrtc/lib /usr/local/cuda/lib64; do
        if compgen -G "$folder/libnvrtc.so*" >/dev/null; then
            nvrtc=$(cd "$folder" && pwd)
            return
        fi
    done
}

# given OPTION ARGUMENTS: whether the option is among them.
given() {
    local option=$1 argument
    shift
    for argument in "$@"; do
        case $argument in "$option" | "$option"=*) return 0 ;; esac
    done
    return 1
}

# Describes the machine, for the log.
describe_machine() {
    echo "date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "machine: $(uname -srm), $(nproc) cores, $(awk '/MemTotal/ { printf "%.0f GB", $2 / 1e6 }' /proc/meminfo)"
    echo "python: $("$python" --version 2>&1)"
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv 2>/dev/null || echo "nvidia-smi: not there, or it failed"
    nvcc --version 2>/dev/null | tail -n 1 || true
}

# Prints why the report cannot be carried back: too many files, nested folders, names, sizes.
faults_of_report() {
    local count
    count=$(find "$1" -type f | wc -l)
    [ "$count" -le "$files_limit" ] || echo "$count files; at most $files_limit are allowed"
    find "$1" -mindepth 2 -type d -printf 'the folder %P is too deep\n'
    find "$1" -mindepth 1 -printf '%P\n' | LC_ALL=C grep -v '^[A-Za-z0-9._/-]*$' | sed 's/^/not a plain name: /' || true
    find "$1" -type f -size +16M -printf '%P is larger than 16 MiB\n'
}

# Prints the progress of each part in the report, for when the program has exited without printing its table.
summary() {
    [ -s "$1/report.jsonl" ] || return 0
    "$python" - "$1/report.jsonl" <<'PYTHON' || true
import json, sys
parts = {}
for line in open(sys.argv[1], encoding="utf-8", errors="replace"):
    try:
        event = json.loads(line)
        part, kind = event["part"], event["event"]
    except (ValueError, KeyError, TypeError):
        continue
    if kind == "end":
        parts[part] = f"{event.get('outcome', '?'):8} {event.get('seconds', 0.0):7.1f} s"
    else:
        parts.setdefault(part, "begun, not ended")
for part, how in list(parts.items())[:29]:
    print(f"{part:12} {how}")
PYTHON
}

run() {
    local out="" seconds="" dry_run="" extra=()
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=$(absolute "${2:?--out needs a folder}"); shift ;;
            --out=*) out=$(absolute "${1#*=}") ;;
            --seconds) seconds=${2:?--seconds needs a number}; shift ;;
            --seconds=*) seconds=${1#*=} ;;
            --dry-run) dry_run=yes ;;
            *) extra+=("$1") ;;
        esac
        shift
    done
    seconds=${seconds:-500}
    case $seconds in '' | *[!0-9]* | 0) die "--seconds is \`$seconds\`; expected a whole number of seconds" ;; esac
    if [ -z "$out" ] && [ -n "${OUT:-}" ]; then out=$(absolute "$OUT"); fi
    if [ -z "$out" ]; then
        out=$root/target/gpu-check
        if [ -e "$out" ]; then
            rm -rf "$out.old"
            mv "$out" "$out.old"
        fi
    fi
    [ ! -e "$out/report.jsonl" ] || die "$out holds a report already; name another folder with --out"
    mkdir -p "$out"
    log=$out/log.txt
    describe_machine >>"$log"

    local program wanted commit=
    wanted=$(pinned)
    if [ -n "${COAR_BIN:-}" ]; then
        program=$(absolute "$COAR_BIN")
        [ -x "$program" ] || die "COAR_BIN is \`$COAR_BIN\`, which is not a program"
        note "program: $program (COAR_BIN)"
    else
        unpack "$root/.gpu"
        program=$work/coar-lab
        wanted=$(field libtorch .gpu/manifest.txt)
        wanted=${wanted%%+*}
        [ "$(field build .gpu/manifest.txt)" = release ] || [ -n "$dry_run" ] ||
            die "the packed program is a debug build, whose speed says nothing; run make build and scripts/gpu-check.sh pack"
        commit=$(field commit .gpu/manifest.txt)
        note "program: $(field version .gpu/manifest.txt), commit $commit, sha256 checked"
    fi

    local torch torch_version nvrtc
    find_torch "$dry_run"
    find_nvrtc
    note "libtorch: $torch_version at $torch/lib"
    note "NVRTC: ${nvrtc:-not found; kernels that are compiled at start are not available}"
    # PyTorch's own folders first, then the machine's setting: on some machines the driver is found through it.
    local libraries=$torch/lib${nvrtc:+:$nvrtc}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    if is_elf "$program"; then
        local missing
        missing=$(LD_LIBRARY_PATH=$libraries ldd "$program" 2>&1 | grep 'not found' | sed 's/^[[:space:]]*//' || true)
        [ -z "$missing" ] || die "the program cannot be loaded on this machine: $missing"
    fi

    local arguments=()
    given --parts "${extra[@]}" || arguments+=(--parts "$parts")
    if [ -n "$dry_run" ]; then
        given --device "${extra[@]}" || arguments+=(--device cpu)
        given --small "${extra[@]}" || arguments+=(--small)
    else
        given --device "${extra[@]}" || arguments+=(--device cuda:0)
        if ! given --model "${extra[@]}" && ! given --shape "${extra[@]}"; then arguments+=(--shape 7b); fi
        given --target-size "${extra[@]}" || arguments+=(--target-size 768)
    fi
    arguments+=(--seconds "$seconds" --out "$out" "${extra[@]}")

    note "coar-lab bench device ${arguments[*]}"
    local grace=${GPU_CHECK_GRACE:-30} status=0 follower lines begun=$EPOCHSECONDS took
    lines=$(wc -l <"$log")
    # Output goes directly to files: a child of a hanging program could hold a pipe open.
    LD_LIBRARY_PATH=$libraries COAR_CACHE=${COAR_CACHE:-$work/cache} GPU_CHECK_COMMIT=$commit \
        timeout --kill-after=15 "$((seconds + grace))" \
        "$program" bench device "${arguments[@]}" >"$out/stdout.txt" 2>>"$log" </dev/null &
    child=$!
    tail -n "+$((lines + 1))" -s 0.5 --pid="$child" -f "$log" >&2 &
    follower=$!
    # A process that hangs inside the driver survives even SIGKILL, so the script does not wait for it.
    local last=$((begun + seconds + grace + 20))
    while kill -0 "$child" 2>/dev/null && [ "$EPOCHSECONDS" -lt "$last" ]; do sleep 0.2; done
    if kill -0 "$child" 2>/dev/null; then
        status=124
        kill "$follower" 2>/dev/null || true
    else
        wait "$child" || status=$?
    fi
    child=
    wait "$follower" 2>/dev/null || true
    took=$((EPOCHSECONDS - begun))

    cat "$out/stdout.txt" >>"$log"
    tail -n "$table_lines" "$out/stdout.txt" >"$work/table"
    rm -f "$out/stdout.txt"
    case $status in
        0) ;;
        124) note "coar was ended by force after $took s; the report holds what was measured until then" ;;
        *) note "coar ended with status $status after $took s" ;;
    esac
    if [ "$(stat -c %s "$log")" -gt $((15 << 20)) ]; then
        { head -c $((1 << 20)) "$log" && printf '\n[left out]\n' && tail -c $((13 << 20)) "$log"; } >"$work/log"
        mv "$work/log" "$log"
    fi
    local faults
    faults=$(faults_of_report "$out")
    if [ -n "$faults" ]; then
        note "the report cannot be carried back as it is: $faults"
        [ "$status" -ne 0 ] || status=1
    fi
    note "report: $out"
    [ -s "$work/table" ] || summary "$out" >"$work/table"
    # The table is printed last.
    cat "$work/table"
    exit "$status"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    pack) pack "$@" ;;
    run) run "$@" ;;
    -h | --help | help) usage ;;
    *)
        usage >&2
        exit 2
        ;;
esac
