"""Decode speed of the Hugging Face Chameleon implementation on a checkpoint of `coar bench make-checkpoint`.

Guidance as the reference inference runs it (two forward passes per token, each with its own key/value cache), and with
both branches as two rows of one batch. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.cache_utils import DynamicCache

GUIDANCE, TOP_K, FIRST_CODE, CODES, ROW_END, SIDE = 4.0, 2000, 128, 8192, 5, 32


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
    for shard in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(shard))
    for name in list(weights):
        if name.endswith(("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")):
            weights[name] = weights[name].expand(config.num_attention_heads, -1).contiguous()
    own = model.state_dict()
    for name, value in weights.items():
        weights[name] = value.to(dtype).reshape(-1).expand(own[name].numel()).reshape(own[name].shape) \
            if value.numel() == 1 else value.to(dtype)
        if weights[name].shape != own[name].shape:
            weights[name] = weights[name][: own[name].shape[0]]
    absent, unknown = model.load_state_dict(weights, strict=False)
    absent = [name for name in absent if "vqmodel" not in name and "vocabulary_mapping" not in name]
    assert not absent and not unknown, (absent, unknown)
    return model


def forward(model, ids, cache, length):
    """Hidden states through the decoder and the whole head, as the library's own generation loop computes them."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True,
                cache_position=torch.arange(length, length + ids.shape[1]), logits_to_keep=1)
    return out.logits[:, -1].float()


def draw(scores):
    scores = scores[:, FIRST_CODE:FIRST_CODE + CODES]
    threshold = torch.topk(scores, TOP_K)[0][:, -1, None]
    scores = scores.masked_fill(scores < threshold, float("-inf"))
    return torch.multinomial(torch.softmax(scores, -1), 1) + FIRST_CODE


@torch.inference_mode()
def run(model, batched: bool, warm_up: int, steps: int) -> float:
    """Seconds per drawn or forced token."""
    # As many tokens in both branches where they are one batch; the shorter unconditional one otherwise.
    prompt = torch.arange(80, 107)[None]
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
            token = torch.tensor([[ROW_END]])
        else:
            token = draw(logits[1:] + GUIDANCE * (logits[:1] - logits[1:]))
        if batched:
            logits = forward(model, token.repeat(2, 1), cache, length)
        else:
            logits = torch.cat([forward(model, token, cache, length), forward(model, token, other, other_length)])
            other_length += 1
        length += 1
    return (time.perf_counter() - begun) / steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=66)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.folder, getattr(torch, args.dtype))
    print(json.dumps({
        "two_passes_tokens_per_second": 1 / run(model, False, 8, args.steps),
        "one_batch_tokens_per_second": 1 / run(model, True, 8, args.steps),
    }))


if __name__ == "__main__":
    main()
