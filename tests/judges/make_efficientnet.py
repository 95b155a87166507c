"""EfficientNet-Lite's outputs for test images, computed with NumPy in f64: the expected values of
`crates/coar-lab/src/eval/judges/efficientnet.rs`.

    python3 -m venv V && V/bin/pip install numpy pillow==10.4.0
    V/bin/python tests/judges/make_efficientnet.py [WEIGHTS]       # writes tests/judges/efficientnet

Nothing is shared with the Rust code: convolutions are sums of shifted images, batch norm is a separate step, and the weights
file is read by Python's unpickler with only two names allowed. The small network's weights are computed by a formula, so only
the expected values are stored. With WEIGHTS (the `.pth` that `scripts/fetch-judge.sh` fetches) the published network's values
are written, too.
"""

import collections
import json
import pathlib
import pickle
import struct
import sys

import numpy as np
from PIL import Image

# repeats, kernel, stride, expansion, channels
LITE0 = dict(
    stem=32,
    stages=[(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)],
    head=1280,
    classes=1000,
)
SMALL = dict(
    stem=8,
    stages=[(1, 3, 1, 1, 4), (2, 3, 2, 3, 6), (2, 5, 2, 3, 8), (2, 3, 2, 2, 10), (1, 5, 1, 2, 12), (2, 5, 2, 2, 14), (1, 3, 1, 2, 16)],
    head=24,
    classes=11,
)
EPSILON = 1e-3


def same(size, kernel, stride):
    """TensorFlow's `SAME` padding: for ceil(size / stride) outputs, with the larger half at the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv(x, weight, stride, depthwise):
    kernel = weight.shape[2]
    out = [-(-n // stride) for n in x.shape[2:]]
    x = np.pad(x, [(0, 0), (0, 0)] + [same(n, kernel, stride) for n in x.shape[2:]])
    y = 0
    for i in range(kernel):
        for j in range(kernel):
            part = x[:, :, i : i + stride * (out[0] - 1) + 1 : stride, j : j + stride * (out[1] - 1) + 1 : stride]
            if depthwise:
                y = y + part * weight[None, :, 0, i, j, None, None]
            else:
                n, c, h, w = part.shape
                y = y + (weight[:, :, i, j] @ part.reshape(n, c, h * w)).reshape(n, -1, h, w)
    return y


class Network:
    def __init__(self, shape, weights):
        self.shape, self.weights = shape, weights

    def layer(self, x, conv_name, norm_name, stride=1, depthwise=False, activate=True):
        w = self.weights
        x = conv(x, w(conv_name + ".weight"), stride, depthwise)
        mean, var, gain, bias = (w(f"{norm_name}.{key}")[:, None, None] for key in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean) / np.sqrt(var + EPSILON) * gain + bias
        return np.clip(x, 0, 6) if activate else x

    def run(self, x):
        x, block, ends = self.layer(x, "_conv_stem", "_bn0", 2), 0, []
        for repeats, kernel, stride, expansion, channels in self.shape["stages"]:
            for repeat in range(repeats):
                name, before = f"_blocks.{block}.", x
                if expansion != 1:
                    x = self.layer(x, name + "_expand_conv", name + "_bn0")
                x = self.layer(x, name + "_depthwise_conv", name + "_bn1", stride if repeat == 0 else 1, depthwise=True)
                x = self.layer(x, name + "_project_conv", name + "_bn2", activate=False)
                if x.shape == before.shape and repeat > 0:
                    x = x + before
                block += 1
            ends.append(x)
        x = self.layer(x, "_conv_head", "_bn1")
        features = x.mean((2, 3))
        logits = features @ self.weights("_fc.weight").T + self.weights("_fc.bias")
        style = [f(end, axis=(2, 3)) for end in ends[1:4] for f in (np.mean, np.std)]
        return dict(logits=logits, features=features, style=np.concatenate(style, 1))


def shapes(shape):
    """Every parameter's shape by name."""
    found = {}

    def layer(conv_name, norm_name, size):
        found[conv_name + ".weight"] = size
        for key in ("running_mean", "running_var", "weight", "bias"):
            found[f"{norm_name}.{key}"] = (size[0],)

    layer("_conv_stem", "_bn0", (shape["stem"], 3, 3, 3))
    width, block = shape["stem"], 0
    for repeats, kernel, _, expansion, channels in shape["stages"]:
        for _ in range(repeats):
            name, inner = f"_blocks.{block}.", width * expansion
            if expansion != 1:
                layer(name + "_expand_conv", name + "_bn0", (inner, width, 1, 1))
            layer(name + "_depthwise_conv", name + "_bn1", (inner, 1, kernel, kernel))
            layer(name + "_project_conv", name + "_bn2", (channels, inner, 1, 1))
            width, block = channels, block + 1
    layer("_conv_head", "_bn1", (shape["head"], width, 1, 1))
    found["_fc.weight"], found["_fc.bias"] = (shape["classes"], shape["head"]), (shape["classes"],)
    return found


def formula(name, count):
    """Numbers in -1..1 that depend only on the name and the index."""
    seed = 2166136261
    for byte in name.encode():
        seed = ((seed ^ byte) * 16777619) % 2**32
    u = (np.arange(count, dtype=np.uint64) * 2654435761 + seed) % 2**32
    u = ((u ^ (u >> np.uint64(16))) * 2246822519) % 2**32
    u = ((u ^ (u >> np.uint64(13))) * 3266489917) % 2**32
    return u.astype(np.float64) / 2**31 - 1


def small(name, size):
    values = formula(name, int(np.prod(size)))
    if name.endswith("running_var"):
        values = 1.25 + values
    elif name.endswith("running_mean"):
        values = 0.3 * values
    elif name.endswith("bias"):
        values = 0.5 * values
    elif len(size) == 1:
        values = 1.0 + 0.5 * values
    else:
        values = values * 2.5 / np.sqrt(np.prod(size[1:]))
    return values.astype(np.float32).astype(np.float64).reshape(size)


def published(file):
    """The tensors of a checkpoint from before PyTorch 1.6."""

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if module == "torch" and name in KINDS:
                return KINDS[name]
            raise pickle.UnpicklingError(f"{module}.{name} is refused")

        def persistent_load(self, described):
            return described[2], described[1]

    with open(file, "rb") as handle:
        for _ in range(3):
            Restricted(handle).load()
        described, keys = Restricted(handle).load(), Restricted(handle).load()
        kinds = {storage[0]: storage[1] for storage, *_ in described.values()}
        data = {}
        for key in keys:
            (count,) = struct.unpack("<q", handle.read(8))
            data[key] = np.frombuffer(handle.read(count * np.dtype(kinds[key]).itemsize), kinds[key])
    tensors = {}
    for name, ((key, _), offset, size, stride) in described.items():
        steps = [step * data[key].itemsize for step in stride]
        tensors[name] = np.lib.stride_tricks.as_strided(data[key][offset:], size, steps).astype(np.float64)
    return tensors


KINDS = {"FloatStorage": np.float32, "LongStorage": np.int64}


def images(count, height, width):
    """8-bit images by a formula: slow waves with noise, different for each index."""
    x, y, c = np.meshgrid(np.arange(width), np.arange(height), np.arange(3))
    for n in range(count):
        noise = formula(f"image {n}", height * width * 3).reshape(height, width, 3)
        waves = ((x * (n + 1) * 3 + y * 5 + c * 80) % 256 - 128) * 0.75
        yield np.floor(128 + waves + 24 * noise).clip(0, 255).astype(np.uint8)


def write(name, found, **more):
    rows = {key: [[float(f"{v:.9g}") for v in row] for row in value] for key, value in found.items()}
    file = pathlib.Path(__file__).parent / "efficientnet" / f"{name}.json"
    file.write_text(json.dumps({**more, **rows}, separators=(",", ":")) + "\n")
    print(file, file.stat().st_size)


def main():
    sizes = shapes(SMALL)
    # Odd and even sizes: each pads differently.
    for name, (height, width) in {"small_odd": (33, 29), "small_even": (48, 64)}.items():
        x = np.stack([(image.astype(np.float64) - 127) / 128 for image in images(2, height, width)]).transpose(0, 3, 1, 2)
        write(name, Network(SMALL, lambda name: small(name, sizes[name])).run(x), height=height, width=width)
    if len(sys.argv) > 1:
        tensors = published(sys.argv[1])
        expected = shapes(LITE0)
        assert all(tensors[name].shape == size for name, size in expected.items())
        # Images of the world's size, resized as the judge does.
        own = [np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC), np.float64) for image in images(2, 128, 128)]
        x = ((np.stack(own) - 127) / 128).transpose(0, 3, 1, 2)
        write("lite0", Network(LITE0, lambda name: tensors[name]).run(x), height=128, width=128)


if __name__ == "__main__":
    main()
