"""What the attacker sends: images that are small to send and large to decode, concept files that are large or broken."""

import json
import os
import random
import struct
import zlib

MIB = 1 << 20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes) -> bytes:
    """An RGBA file of 16 bits per channel from its compressed rows."""
    head = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(side: int = 6324) -> bytes:
    """40 million pixels, 320 MB when decoded, 330 kB to send."""
    deflate = zlib.compressobj(6)
    row = bytes(1 + 8 * side)
    data = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    return png(side, side, data)


def noise(mebibytes: int = 18) -> bytes:
    """A valid image that does not get smaller by encoding it again."""
    side = int((mebibytes * MIB / 8) ** 0.5)
    rows = b"".join(b"\0" + random.randbytes(8 * side) for _ in range(side))
    return png(side, side, zlib.compress(rows, 0))


def read_concept(file: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8:8 + length]), file[8 + length:]


def write_concept(header: dict | bytes, body: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def settings(header: dict, **more) -> None:
    """Changes hyper-parameters in a concept's header."""
    metadata = header["__metadata__"]
    metadata["hyper_parameters"] = json.dumps(json.loads(metadata["hyper_parameters"]) | more)


def inflated(file: bytes, mebibytes: int = 62) -> bytes:
    """A concept with as many tokens as the size of a file lets it have."""
    header, _ = read_concept(file)
    layers, _, hidden = header["text"]["shape"]
    tokens = mebibytes * MIB // (4 * layers * hidden)
    size = 4 * layers * tokens * hidden
    settings(header, text_tokens=tokens, start_words=[])
    header["text"] = {"dtype": "F32", "shape": [layers, tokens, hidden], "data_offsets": [0, size]}
    header["image"] = {"dtype": "F32", "shape": [layers, 0, hidden], "data_offsets": [size, size]}
    return write_concept(header, bytes(size))


def wordy(file: bytes) -> bytes:
    """A subject whose class noun fills the header."""
    header, body = read_concept(file)
    header["__metadata__"] |= {"kind": "subject", "class_noun": "cat" * 10_000}
    settings(header, kind="subject", class_noun="cat" * 10_000)
    return write_concept(header, body)


def changed(file: bytes, value: float) -> bytes:
    header, body = read_concept(file)
    return write_concept(header, struct.pack("<f", value) + body[4:])


def broken(file: bytes) -> list[bytes]:
    """Each must be refused, and none may take more than its own size of memory."""
    header, body = read_concept(file)
    huge = {**header, "text": {**header["text"], "shape": [2**31, 2**31, 2**31]}}
    outside = {**header, "text": {**header["text"], "data_offsets": [0, 2**62]}}
    return [
        b"",
        file[:7],
        file[: len(file) // 2],
        file[:-1],
        file + b"\0",
        struct.pack("<Q", 2**63) + file[8:],
        struct.pack("<Q", 65_537) + file[8:] + bytes(65_537),
        write_concept(b"[" * 60_000, body),
        write_concept(b'{"a":' * 10_000, body),
        write_concept(huge, body),
        write_concept(outside, body),
        changed(file, float("nan")),
        changed(file, float("inf")),
        os.urandom(MIB),
        bytes(63 * MIB),
        b"PK\x03\x04" + os.urandom(4096),
        b"\x80\x02]q\x00." + os.urandom(4096),
    ]


def prompts() -> list[str]:
    """As long as is allowed, and slow to take apart."""
    return [
        "a cat",
        "a " * 2000,
        "<" * 4000,
        "<x>" * 1333,
        "cat " * 1000,
        "".join(chr(random.randrange(0x4E00, 0x9FFF)) for _ in range(4000)),
        "".join(chr(random.randrange(0x1F300, 0x1F600)) for _ in range(4000)),
        "a\u0301" * 2000,
        "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(4000)),
    ]
