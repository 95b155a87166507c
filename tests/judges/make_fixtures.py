"""Model folders with random weights, and what `transformers` and Pillow make of them: the fixtures of `crates/coar-lab/src/eval/judges`.

    python3 -m venv V && V/bin/pip install torch transformers==5.24.0 pillow==10.4.0 numpy safetensors
    V/bin/python tests/judges/make_fixtures.py                     # writes tests/judges/tiny
    V/bin/python tests/judges/make_fixtures.py --published DIR     # folders of the published sizes, 700 MB
    COAR_JUDGES=DIR cargo test -p coar-lab --lib published_size -- --ignored --nocapture

Pillow 10.4 is of the reference's time; Pillow 13 gives other values for some tall pictures. The DreamBooth protocol's
preparation is that of torchvision's Resize, CenterCrop, ToTensor and Normalize, written out here on Pillow and torch.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import shutil

import numpy
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
# Wide, tall, of exactly the input size, and with an odd margin after DreamBooth's resize.
PICTURES = [(40, 31), (13, 50), (28, 28), (61, 37)]
TEXTS = [
    "a dog in the jungle",
    "A  Red\tBackpack,\n on TOP of a dirt road!!!",
    "it's a caf\u00e9 with na\u00efve cats & dogs' toys: 3.14 \u2014 don't",
    "caf\u0065\u0301 \u00c9COLE stra\u00dfe \u4f60\u597d \U0001f600\u200d \u0130",
    "\u00a0 leading and trailing \u3000",
    "",
    "a photo of a toy, " * 30,
    "x" * 200,
    f"words {END} after the end",
    f"{BEGIN} begun twice",
]
CORPUS = "a dog in the jungle a red backpack on top of a dirt road it's a cat with the toy photo of the other thing"
RESIZES = [
    ((40, 31), (28, 28)), ((61, 47), (256, 197)), ((20, 133), (28, 186)), ((300, 96), (40, 41)), ((13, 50), (28, 107)),
    ((500, 333), (48, 32)), ((64, 200), (28, 87)), ((200, 64), (87, 28)), ((1, 9), (5, 45)), ((7, 1), (3, 3)),
    ((37, 37), (37, 12)), ((37, 37), (99, 37)), ((640, 480), (299, 224)),
]


def noise(width, height, state=7):
    """The image that the tests generate with the same numbers."""
    out = bytearray()
    for _ in range(3 * width * height):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return Image.frombytes("RGB", (width, height), bytes(out))


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n")


def vocabulary():
    """A separate byte-pair vocabulary, in which the end token is not the largest id."""
    letters = list(bytes_to_unicode())
    words = [tuple(word[:-1]) + (word[-1] + "</w>",) for word in CORPUS.split()]
    merges = []
    while len(merges) < 60:
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [merged(word, best) for word in words]
    names = letters + [letter + "</w>" for letter in letters] + [BEGIN, END] + ["".join(pair) for pair in merges]
    return {name: index for index, name in enumerate(names)}, merges


def merged(word, pair):
    out, at = [], 0
    while at < len(word):
        step = 2 if word[at:at + 2] == pair else 1
        out.append("".join(word[at:at + step]))
        at += step
    return tuple(out)


def bytes_to_unicode():
    """The printable characters that represent bytes, in the order of OpenAI's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def randomised(model, seed, half):
    """Randomises every parameter, including biases and norms; with `half`, values are exactly representable in half precision."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
        if half:
            parameter.data = parameter.data.half().float()
    return model.eval()


def dreambooth(image, side):
    """Resize(256, bicubic), CenterCrop(224), ToTensor, Normalize, for another side in proportion."""
    short = round(side * 256 / 224)
    width, height = image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int(round((size[0] - side) / 2.0)), int(round((size[1] - side) / 2.0))
    image = image.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return pixels.sub_(mean).div_(std)


def folder(path, model, preprocessor, half, config=None):
    path.mkdir(parents=True)
    model.save_pretrained(path)
    if config:
        write_json(path / "config.json", config)
    if half:
        from safetensors.torch import load_file
        tensors = load_file(path / "model.safetensors")
        save_file({name: tensor.half() for name, tensor in tensors.items()}, path / "model.safetensors")
    write_json(path / "preprocessor_config.json", preprocessor)


def as_pickle(source, path):
    """The same folder with the weights in the other format."""
    from safetensors.torch import load_file
    path.mkdir()
    tensors = load_file(source / "model.safetensors")
    state = collections.OrderedDict((name, tensor.clone()) for name, tensor in tensors.items())
    # `Module.state_dict` adds this attribute, so every published file has it.
    state._metadata = collections.OrderedDict([("", {"version": 1}), ("layernorm", {"version": 1})])
    torch.save(state, path / "pytorch_model.bin")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(source / name, path / name)


def make(out, dino_config, clip_config, half, pictures):
    """Writes both folders and their expected outputs."""
    expected, told = {}, {"transformers": transformers.__version__, "torch": torch.__version__, "pillow": Image.__version__}
    torch.manual_seed(0)
    images = [noise(*size) for size in pictures]
    with torch.no_grad():
        side = dino_config.image_size
        model = randomised(ViTModel(dino_config), 1, half)
        # As in the published folder: one number, which means a square here.
        preprocessor = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
                        "resample": 2, "size": side, **IMAGENET}
        folder(out / "dino", model, preprocessor, half)
        processor = ViTImageProcessorPil(**preprocessor)
        pixels = torch.stack([torch.from_numpy(processor(image).pixel_values[0]) for image in images])
        expected["dino.folder.pixels"] = pixels
        expected["dino.folder"] = model(pixels).last_hidden_state[:, 0]
        pixels = torch.stack([dreambooth(image, side) for image in images])
        expected["dino.dreambooth.pixels"] = pixels
        expected["dino.dreambooth"] = model(pixels).last_hidden_state[:, 0]

        side = clip_config.vision_config.image_size
        model = randomised(CLIPModel(clip_config), 2, half)
        preprocessor = {"crop_size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True,
                        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": side, **OPENAI}
        folder(out / "clip", model, preprocessor, half)
        processor = CLIPImageProcessorPil(**preprocessor)
        pixels = torch.stack([torch.from_numpy(processor(image).pixel_values[0]) for image in images])
        expected["clip.pixels"] = pixels
        expected["clip.pictures"] = model.get_image_features(pixels).pooler_output

        vocab, merges = vocabulary()
        (out / "clip" / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
        lines = "".join(f"{a} {b}\n" for a, b in merges)
        (out / "clip" / "merges.txt").write_text(f"#version: 0.2\n{lines}")
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)
        batch = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        told["ids"] = [ids[:length] for ids, length in zip(batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist())]
        expected["clip.texts"] = model.get_text_features(**batch).pooler_output
        # The published file's eos_token_id is 2, for which the largest id is used.
        model.text_model.eos_token_id = 2
        expected["clip.texts.legacy"] = model.get_text_features(**batch).pooler_output
    told["texts"], told["pictures"] = TEXTS, pictures
    write_json(out / "expected.json", told)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, out / "expected.safetensors")


def resizes():
    """Digests of the output of Pillow's two filters for several sizes."""
    rows = []
    for source, size in RESIZES:
        for filter in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            data = noise(*source).resize(size, filter).tobytes()
            rows.append({"from": source, "to": size, "resample": int(filter), "sha256": hashlib.sha256(data).hexdigest()})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", metavar="DIR", type=pathlib.Path, help="folders of the published sizes, in DIR")
    published = parser.parse_args().published
    vocab_size, end = len(vocabulary()[0]), vocabulary()[0][END]
    if published:
        dino = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=224,
                         patch_size=16)
        clip = CLIPConfig(text_config={"eos_token_id": end, "bos_token_id": end - 1})
        make(published, dino, clip, False, [(640, 480), (300, 500), (224, 224), (97, 151)])
        return
    out = pathlib.Path(__file__).parent / "tiny"
    shutil.rmtree(out, ignore_errors=True)
    dino = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=28, patch_size=7)
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36, "vocab_size": vocab_size,
            "bos_token_id": end - 1, "eos_token_id": end, "layer_norm_eps": 1e-3}
    vision = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 44, "image_size": 24,
              "patch_size": 8, "hidden_act": "gelu"}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    make(out, dino, clip, True, PICTURES)
    as_pickle(out / "dino", out / "dino_pickle")
    write_json(out / "resize.json", resizes())


main()
