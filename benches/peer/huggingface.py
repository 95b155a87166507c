"""Decode speed of the Hugging Face Chameleon implementation on a checkpoint of `coar-lab bench make-checkpoint`.

Guidance as the reference inference runs it (two forward passes per token, each with its own key/value cache), and with
both branches as two rows of one batch. Prints one JSON object.

With --check COAR instead: the logits of one prompt, computed by the program COAR and here, both in f32, must agree.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.cache_utils import DynamicCache

GUIDANCE, TOP_K, SIDE = 4.0, 2000, 32
# Both implementations take the sums of f32 in another order.
TOLERANCE = 1e-3


class Ids:
    """Ids by their names in the checkpoint's tokenizer."""

    def __init__(self, folder: Path):
        names = json.loads((folder / "text_tokenizer.json").read_text())["model"]["vocab"]
        codes = sorted(id for name, id in names.items() if name.startswith("IMGIMG"))
        self.first_code, self.codes = codes[0], len(codes)
        assert codes == list(range(codes[0], codes[0] + len(codes))), "image codes are not one range of ids"
        self.row_end = names["<reserved08799>"]
        grids = names[f"<reserved{8800 + SIDE // 2:05}>"]
        self.start = [names["<racm3:break>"], grids, grids]
        # As long as a short prompt; what the other ids are does not matter to the clock.
        self.prompt = [names["<s>"], *range(names["<reserved08799>"] + 1, names["<reserved08799>"] + 24), *self.start]


def load(folder: Path, dtype: torch.dtype):
    raw = json.loads((folder / "config.json").read_text())
    config = ChameleonConfig(
        **{key: raw[key] for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")},
        model_parallel_size=1,
        swin_norm=raw.get("swin_norm", False),
        # The picture tokenizer takes no part in decoding; a small one saves its memory.
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 32},
        vocabulary_map={"<image>": 1, "IMGIMGA": 2},
        attn_implementation="sdpa",
    )
    model = ChameleonForConditionalGeneration(config).to(dtype).eval()
    weights = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(shard))
    for name in list(weights):
        if name.endswith(("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")):
            weights[name] = weights[name].expand(config.num_attention_heads, -1).contiguous()
    weights = {name: value.to(dtype) for name, value in weights.items()}
    absent, unknown = model.load_state_dict(weights, strict=False)
    absent = [name for name in absent if "vqmodel" not in name and "vocabulary_mapping" not in name]
    assert not absent and not unknown, (absent, unknown)
    return model


def forward(model, ids, cache, length):
    """Hidden states through the decoder and the whole head, as the library's own generation loop computes them."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True,
                cache_position=torch.arange(length, length + ids.shape[1]), logits_to_keep=1)
    return out.logits[:, -1].float()


def draw(scores, ids):
    scores = scores[:, ids.first_code:ids.first_code + ids.codes]
    threshold = torch.topk(scores, TOP_K)[0][:, -1, None]
    scores = scores.masked_fill(scores < threshold, float("-inf"))
    return torch.multinomial(torch.softmax(scores, -1), 1) + ids.first_code


@torch.inference_mode()
def run(model, ids: Ids, batched: bool, warm_up: int, steps: int) -> float:
    """Seconds per drawn or forced token."""
    # As many tokens in both branches where they are one batch; the shorter unconditional one otherwise.
    prompt = torch.tensor([ids.prompt])
    if batched:
        cache, length = DynamicCache(), prompt.shape[1]
        logits = forward(model, prompt.repeat(2, 1), cache, 0)
    else:
        cache, other = DynamicCache(), DynamicCache()
        length, other_length = prompt.shape[1], 3
        logits = torch.cat([forward(model, prompt, cache, 0), forward(model, prompt[:, -3:], other, 0)])
    for step in range(warm_up + steps):
        if step == warm_up:
            begun = time.perf_counter()
        # A row end is forced, and fed like every other token.
        if step % (SIDE + 1) == SIDE:
            token = torch.tensor([[ids.row_end]])
        else:
            token = draw(logits[1:] + GUIDANCE * (logits[:1] - logits[1:]), ids)
        if batched:
            logits = forward(model, token.repeat(2, 1), cache, length)
        else:
            logits = torch.cat([forward(model, token, cache, length), forward(model, token, other, other_length)])
            other_length += 1
        length += 1
    return (time.perf_counter() - begun) / steps


@torch.inference_mode()
def check(model, ids: Ids, coar: Path, folder: Path):
    """Compares the logits after a prompt and some codes; returns the largest difference."""
    sequence = ids.prompt + [ids.first_code + 37 * index % ids.codes for index in range(40)]
    ours = json.loads(subprocess.run(
        [coar, "bench", "logits", folder, "--dtype", "f32", "--ids", ",".join(map(str, sequence))],
        check=True, capture_output=True, text=True).stdout)
    # The library masks image codes out of its logits; the head itself does not.
    theirs = model.lm_head(model.model(input_ids=torch.tensor([sequence])).last_hidden_state[:, -1]).float()[0]
    differences = {}
    for name in ("logits", "decode_step_logits"):
        mine = torch.tensor(ours[name])
        assert mine.shape == theirs.shape and torch.isfinite(mine).all(), (name, mine.shape, theirs.shape)
        differences[name] = (mine - theirs).abs().max().item()
    print(json.dumps({"largest_difference": differences, "largest_logit": theirs.abs().max().item()}))
    assert max(differences.values()) <= TOLERANCE, f"the two do not compute the same: {differences}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=66)
    parser.add_argument("--check", type=Path, metavar="COAR")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, ids = load(args.folder, getattr(torch, args.dtype)), Ids(args.folder)
    if args.check:
        return check(model, ids, args.check, args.folder)
    print(json.dumps({
        "two_passes_tokens_per_second": 1 / run(model, ids, False, 8, args.steps),
        "one_batch_tokens_per_second": 1 / run(model, ids, True, 8, args.steps),
    }))


if __name__ == "__main__":
    main()
