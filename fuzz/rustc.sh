#!/bin/sh
# rustc, with libFuzzer's counters in the crates that read foreign bytes; the others stay as they are, which keeps the build
# short. fuzz/run.sh sets it as RUSTC_WRAPPER. Counters alone and no sanitizer: a stable toolchain does.
rustc=$1
shift
name= kind=
for argument; do
    case $before in
    --crate-name) name=$argument ;;
    --crate-type) kind=$argument ;;
    esac
    before=$argument
done
case $name in
coar | coar_core | coar_engine | coar_lab | parsers | image | image_webp | png | zune_jpeg | zune_core | fdeflate | zip | zlib_rs | safetensors | serde_json | multer | httparse | toml | toml_parser | tokenizers | serde_norway | url)
    exec "$rustc" "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
esac
# Programs of the build use some of those crates too, and have no libFuzzer that the counters could report to.
if [ "$kind" = proc-macro ] || [ "$name" = build_script_build ] || [ "$name" = build_script_main ] || [ "$name" = seeds ]; then
    exec "$rustc" "$@" -Clink-arg="$COAR_FUZZ_STUB"
fi
exec "$rustc" "$@"
