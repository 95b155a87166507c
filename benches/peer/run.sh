#!/usr/bin/env bash
# coar's decode step beside the Hugging Face Chameleon implementation: same random checkpoint, dtype and threads, in turn.
# First both must compute the same logits. Tokens are codes and row ends, on both sides.
# Usage: benches/peer/run.sh [SHAPE] [ROUNDS]; PEER_VENV and CKPT choose where things lie.
set -euo pipefail
cd "$(dirname "$0")/../.."
shape=${1:-30m} rounds=${2:-3} threads=$(nproc)
venv=${PEER_VENV:-target/peer-venv} checkpoint=${CKPT:-target/checkpoint-$shape}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r benches/peer/requirements.txt
[ -n "${COAR_BIN:-}" ] || cargo build --release -p coar-lab
[ -e "$checkpoint/text_tokenizer.json" ] || "${COAR_BIN:-target/release/coar-lab}" bench make-checkpoint --shape "$shape" --out "$checkpoint"
"$venv/bin/python" benches/peer/huggingface.py "$checkpoint" --check "${COAR_BIN:-target/release/coar-lab}"
for dtype in f32 bf16; do
    long=float32; [ "$dtype" = bf16 ] && long=bfloat16
    for _ in $(seq "$rounds"); do
        "${COAR_BIN:-target/release/coar-lab}" bench decode "$checkpoint" --dtype "$dtype" --device cpu --plain --pictures 1 --steps 64 \
            --threads "$threads" --json
        "$venv/bin/python" benches/peer/huggingface.py "$checkpoint" --dtype "$long" --threads "$threads"
    done | "$venv/bin/python" -c '
import json, statistics, sys
text, decoder, found = sys.stdin.read(), json.JSONDecoder(), []
while text.strip():
    value, end = decoder.raw_decode(text.lstrip())
    found.append(value)
    text = text.lstrip()[end:]
middle = statistics.median
own = middle(v["steps"][0]["tokens_per_second"] for v in found if "steps" in v)
two = middle(v["two_passes_tokens_per_second"] for v in found if "steps" not in v)
one = middle(v["one_batch_tokens_per_second"] for v in found if "steps" not in v)
print(f"{sys.argv[1]}: coar {own:.1f} tokens/s; Hugging Face {two:.1f} tokens/s in two passes "
      f"({own / two:.2f} x), {one:.1f} in one batch ({own / one:.2f} x)")
' "$dtype"
done
