"""Zip archives, safetensors headers and indices with one or more odd things in them."""

from __future__ import annotations

import io
import json
import random
import zipfile

import torch

from tests.fuzz.hostile_pickles import Grammar

ODD: list[object] = [
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 10**400, 1e999, -1e999, 1.5, "", "F32", "x" * 3000, "\ud800",
    [], [0], [1, 2], [-1], [2**63], [0, 2**63], [2**62, 2**62, 0], [1] * 60_000, {}, {"a": {}}, [[1]], "\n\x00",
]  # fmt: skip
STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.count": torch.tensor(7), "c": torch.ones(2).half()}


def torch_bytes(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


GOOD_ZIP = torch_bytes({"ema": STATE, "model": STATE, "args": {"lr": 1e-4}})


def archive(rng: random.Random) -> bytes:
    """A torch.save archive with another table of contents, odd members, or damaged bytes."""
    with zipfile.ZipFile(io.BytesIO(GOOD_ZIP)) as good:
        members = {info.filename: good.read(info) for info in good.infolist()}
    if rng.random() < 0.6:
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = Grammar(rng).whole()
    if rng.random() < 0.3:
        name = rng.choice(list(members))
        members[name] = members[name][: rng.randrange(len(members[name]) + 1)]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as odd:
        for name, data in members.items():
            if rng.random() < 0.95:
                odd.writestr(rng.choice([name] * 12 + ["x", "../../etc/passwd", "\udc80\n"][:2]), data)
    content = bytearray(stream.getvalue())
    for _ in range(rng.choice([0, 0, 1, 4])):  # most of them in the directory at the end
        content[rng.randrange(max(0, len(content) - 900), len(content))] = rng.randrange(256)
    return bytes(content)


def header(rng: random.Random) -> bytes:
    """A safetensors file whose header has odd values in odd places."""
    entries: dict[str, object] = {
        "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [48, 52]},
    }
    for _ in range(rng.choice([0, 1, 1, 2])):
        entry = rng.choice([value for value in entries.values() if isinstance(value, dict)])
        entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(ODD)
    if rng.random() < 0.3:
        entries[rng.choice(["", "\ud800", "\n", "x" * 100_000, "__metadata__"])] = rng.choice(ODD)
    if rng.random() < 0.5:
        own = {rng.choice(["format", "family", "arch", "weights", "w"]): rng.choice(ODD) for _ in range(2)}
        text = json.dumps(own) if rng.random() < 0.8 else rng.choice(["", "[]", "x", "[" * 5000, '{"arch": NaN}'])
        entries["__metadata__"] = {"neon": text, "format": "pt", "z": "a"}
    text = json.dumps(entries)
    if rng.random() < 0.1:
        text = rng.choice(["[" * 100_000, '{"a":' * 2000, "{}", "{" + " " * 50, text[:-1], '{"a": 1, "a": 2}'])
    body = text.encode() + b" " * rng.choice([0, 0, 15_392 - min(15_392, len(text)), 60])
    length = rng.choice([len(body)] * 12 + [0, 2**40, 2**63, len(body) - 1, 60])
    return length.to_bytes(8, "little") + body + bytes(rng.choice([52, 52, 52, 0, 51, 1000]))


def index(rng: random.Random) -> bytes:
    """An index.json of shards that are not there, or of odd names."""
    names = {rng.choice(["a", "", "\n"]): rng.choice([*ODD, "../x", "/etc/passwd", ".", "a.safetensors"])}
    whole = rng.choice([{"weight_map": names}, {"weight_map": rng.choice(ODD)}, {"x": names}, rng.choice(ODD)])
    return json.dumps(whole).encode()


MAKERS = {"pickle": lambda rng: Grammar(rng).whole(), "zip": archive, "safetensors": header, "index": index}
