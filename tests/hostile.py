"""What strangers may send: broken and crafted pictures, JSON, pickles, safetensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKER = "executed"
DEEP = 100_000


class Harm:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        """Remember where."""
        self.target = str(folder / MARKER)

    def __reduce__(self) -> Any:
        """What a pickle runs when it is read."""
        return os.mkdir, (self.target,)


def pickles(folder: Path) -> dict[str, bytes]:
    """Pickles that run code: bare, in torch's zip, and in its old layout."""
    import torch

    found = {"bare": pickle.dumps(Harm(folder))}
    for name, whole in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        state = {"state_dict": {"a": torch.zeros(2)}, "more": Harm(folder)}
        torch.save(state, file, _use_new_zipfile_serialization=whole)
        found[name] = file.getvalue()
    return found


def json_texts() -> dict[str, bytes]:
    """Files that are no JSON, or not what any reader wants."""
    return {
        "deep lists": b"[" * DEEP,
        "deep closed": b"[" * DEEP + b"]" * DEEP,
        "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "torn": b'{"prompt": "a c',
        "binary": pickle.dumps({"prompt": "a"}),
        "latin-1": b'{"prompt": "\xe9"}',
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
        "many digits": b'{"prompt": ' + b"9" * 5000 + b"}",
        "empty": b"",
        "null": b"null",
        "number": b"5",
        "text": b'"x"',
        "list": b"[1, 2]",
        "list of lists": b"[[1], [2]]",
        "list of nulls": b"[null]",
        "object": b"{}",
        "wrong types": json.dumps(dict.fromkeys(WORDS, 7)).encode(),
        "lists inside": json.dumps({key: [[]] for key in WORDS}).encode(),
        "nulls inside": json.dumps(dict.fromkeys(WORDS)).encode(),
    }


BROKEN = (  # no reader can take these
    *("deep lists", "deep closed", "deep objects", "torn", "binary", "latin-1", "UTF-16"),
    "many digits",
)
WORDS = (
    *("prompt", "image", "label", "chosen", "rejected", "images", "ranks", "file_name", "text"),
    *("version", "files", "recipe", "step", "samples_seen", "dict", "lora_alpha", "r", "id"),
    *("_class_name", "unet", "scheduler", "_diffusers_version", "model_cfg", "vision_config"),
    *("number", "answer", "protocol", "tasks", "overall", "score", "correct", "tag", "graded"),
    *("caption", "path1", "path2", "image_path", "rank", "generations", "ranking", "pairs"),
    *("models", "caption", "jpg_0", "jpg_1", "label_0", "label_1", "image0", "image1", "exported"),
    *("file", "judge.version", "judge", "rows", "image_mean", "last", "fingerprint", "weight"),
)


def safetensors(header: Mapping[str, Any] | bytes, body: bytes = b"", size: int = -1) -> bytes:
    """A safetensors file with any header and any claim of its length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size < 0 else size) + raw + body


def safetensors_files() -> dict[str, bytes]:
    """Headers that lie."""
    huge = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    short = {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}
    negative = {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}
    return {
        "giant header": safetensors(b"{}", size=(1 << 63) - 1),
        "long header": safetensors(b"{}" + b" " * 1000, size=200_000_000),
        "giant tensor": safetensors({"a": huge}, b"\0" * 16),
        "other size": safetensors({"a": short}, b"\0" * 16),
        "negative": safetensors({"a": negative}, b"\0" * 16),
        "deep header": safetensors(b'{"a":' * DEEP),
        "overlap": safetensors(
            {k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}, b"\0" * 8
        ),
        "empty": b"",
        "torn": safetensors({"a": short})[:-3],
        "text": b"not tensors at all",
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, body: bytes = b"", more: bytes = b"", bits: int = 8) -> bytes:
    """A PNG by its header, whatever its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(body, 9))
    return b"\x89PNG\r\n\x1a\n" + head + more + pixels + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small pictures that claim, or unpack to, a great deal."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (1 << 27), 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * (1 << 27), 9))
    tiff = b"II*\0\x08\0\0\0\x04\0" + b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in ((256, 100_000), (257, 100_000), (258, 8), (262, 1))
    )
    endless = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 256, 4, 1, 1) + b"\x08\0\0\0"
    return {
        "png of 4 gigapixels": png(65_000, 65_000),
        "png of 2^31": png((1 << 31) - 1, (1 << 31) - 1),
        "png whose pixels never end": png(8, 8, b"\0" * (1 << 27)),
        "png with a text bomb": png(8, 8, b"\0" * 200, text),
        "png with a profile bomb": png(8, 8, b"\0" * 200, profile),
        "gif of 4 gigapixels": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0;",
        "bmp of 10 gigapixels": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 1, 1, 0, 0),
        "bmp of negative width": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, -100, -100, 1, 24, 0, 0, 1, 1, 0, 0),
        "ppm of 10 gigapixels": b"P6 100000 100000 255\n",
        "ppm of many digits": b"P6 " + b"9" * 5000 + b" 9 255\n",
        "tiff of 10 gigapixels": tiff + b"\0\0\0\0",
        "tiff in a circle": endless,
    }


def zero_sized() -> dict[str, bytes]:
    """Pictures without a pixel."""
    return {
        "png": png(0, 0),
        "gif": b"GIF89a" + b"\0" * 7 + b";",
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 0, 0, 1, 24, 0, 0, 1, 1, 0, 0),
        "ppm": b"P6 0 0 255\n",
    }


def no_pictures() -> dict[str, bytes]:
    """Files of other kinds under a picture's name; some would start other programs."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", b"\0" * (1 << 24))
    return {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "pdf": b"%PDF-1.4\n1 0 obj\n",
        "zip": packed.getvalue(),
        "wmf": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "text": b"hello",
        "null bytes": b"\0" * 100,
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    }
