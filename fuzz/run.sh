#!/usr/bin/env bash
# fuzz/run.sh [SECONDS] [TARGET...]: feeds each target for that long (20 seconds, all targets), beginning with the kept corpus.
# New inputs go to fuzz/target/corpus, what fails to fuzz/target/failures. Ends with 1 where something has failed.
# fuzz/run.sh keep [TARGET...]: builds the kept corpus anew from both, with no more than leads somewhere.
set -euo pipefail
cd "$(dirname "$0")"
[ "${BUILT:-}" ] || ./build.sh
export LD_LIBRARY_PATH=$PWD/../.libtorch/torch/lib
seconds=${1:-20}
shift || true
all=$(ls corpus)
failed=
if [ "$seconds" = keep ]; then
    for target in ${*:-$all}; do
        mkdir -p "target/corpus/$target" "target/kept/$target"
        COAR_FUZZ=$target target/debug/parsers -merge=1 -max_len=1024 "target/kept/$target" "corpus/$target" "target/corpus/$target" 2>/dev/null
        # The whole would be megabytes: a hundred of them, of all sizes, up to 40 KB, beside seeds and failures.
        find "corpus/$target" -type f ! -name 'seed-*' ! -name 'failed-*' -delete
        count=$(find "target/kept/$target" -type f | wc -l)
        total=0
        while read -r size file; do
            total=$((total + size))
            [ $total -gt 40000 ] || cp "$file" "corpus/$target/"
        done < <(find "target/kept/$target" -type f -printf '%s %p\n' | sort -n | awk -v step=$((count / 100 + 1)) 'NR % step == 0')
    done
    exit 0
fi
for target in ${*:-$all}; do
    mkdir -p "target/corpus/$target" "target/failures"
    log=target/$target.log
    status=passed
    COAR_FUZZ=$target target/debug/parsers "target/corpus/$target" "corpus/$target" -max_total_time="$seconds" -max_len=4096 \
        -timeout=10 -rss_limit_mb=2048 -artifact_prefix="target/failures/$target-" -print_final_stats=1 >"$log" 2>&1 || {
        status=FAILED
        failed=1
    }
    echo "$target $status: $(grep -a -o 'stat::number_of_executed_units: .*' "$log" | cut -d' ' -f2) runs, $(grep -a -o 'cov: [0-9]*' "$log" | tail -1)"
    [ $status = passed ] || grep -a -v '^#' "$log" | tail -20
done
[ -z "$failed" ]
