"""Pickles from a grammar: every opcode that a checkpoint may hold, nested, shared, cyclic, huge, and some that it may
not."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Callable

GLOBALS = [
    "collections OrderedDict", "collections defaultdict", "argparse Namespace", "_codecs encode", "builtins set",
    "builtins frozenset", "builtins list", "builtins tuple", "builtins dict", "builtins object", "numpy dtype",
    "numpy.core.multiarray scalar", "torch Size", "torch FloatStorage", "torch float32", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch.storage _load_from_bytes", "torch.nn.modules.linear Linear", "torch_utils.persistence "
    "_reconstruct_persistent_obj", "dnnlib.util EasyDict", "omegaconf.dictconfig DictConfig", "functools partial",
]  # fmt: skip
FORBIDDEN = ["os mkdir", "posix system", "builtins eval", "builtins __import__", "subprocess Popen", "pickle loads"]
TEXTS = [
    "",
    "ema",
    "model",
    "state_dict",
    "_modules",
    "_parameters",
    "a.weight",
    "x" * 5000,
    "\n\x00\x1b[2J",
    "é\u2028",
]
NUMBERS = [0, 1, -1, 4, 255, 2**31, 2**63 - 1, 2**63, -(2**63), 2**1500, 10**7]


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name_of(name: str) -> bytes:
    return f"c{name.replace(' ', chr(10))}\n".encode()


class Grammar:
    """One random value after the other, as the opcodes that push it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.memo = 0

    def value(self, depth: int = 4) -> bytes:
        leaf: list[Callable[[], bytes]] = [self.leaf, self.recall]
        inner: list[Callable[[], bytes]] = [
            lambda: b"(" + self.several(depth) + self.rng.choice([b"t", b"l", b"d", b"\x91"]),
            lambda: b"}(" + self.several(depth) + b"u",
            lambda: b"}" + self.key(depth) + self.value(depth - 1) + b"s",
            lambda: b"](" + self.several(depth) + b"e",
            lambda: b"\x8f(" + self.several(depth) + b"\x90",
            lambda: self.value(depth - 1) + self.value(depth - 1) + b"\x86",
            lambda: self.call(depth),
            lambda: self.call(depth) + self.value(depth - 1) + b"b",
            lambda: self.value(depth - 1) + b"Q",
            lambda: self.shared(),
            lambda: self.cycle(),
            lambda: self.deep(),
        ]
        pushed = self.rng.choice(leaf if depth <= 0 else leaf + inner)()
        if self.rng.random() < 0.3:
            pushed += b"q" + bytes([self.memo % 256])
            self.memo += 1
        return pushed

    def several(self, depth: int) -> bytes:
        return b"".join(self.value(depth - 1) for _ in range(self.rng.randrange(5)))

    def key(self, depth: int) -> bytes:
        return text(self.rng.choice(TEXTS)) if self.rng.random() < 0.7 else self.value(depth - 1)

    def leaf(self) -> bytes:
        return self.rng.choice(
            [
                b"N", b"\x88", b"\x89", b")", text(self.rng.choice(TEXTS)), number(self.rng.choice(NUMBERS)),
                b"G" + struct.pack(">d", self.rng.choice([0.5, float("nan"), float("inf"), 1e300])),
                b"C\x03abc", b"B\xff\xff\xff\x7f", b"\x8e" + struct.pack("<Q", 2**50),
                f"I{self.rng.choice(NUMBERS)}\n".encode(), name_of(self.rng.choice(GLOBALS)),
            ]
        )  # fmt: skip

    def recall(self) -> bytes:
        return b"h" + bytes([self.rng.randrange(max(1, min(self.memo, 256)))])

    def call(self, depth: int) -> bytes:
        name = self.rng.choice(GLOBALS if self.rng.random() < 0.95 else FORBIDDEN)
        return name_of(name) + b"(" + self.several(depth) + b"t" + self.rng.choice([b"R", b"\x81"])

    def shared(self) -> bytes:
        """A list, tuple or key that holds the one before it twice, 40 deep: 2^40 when unfolded."""
        pair = self.rng.choice([b"2\x86", b"2l", b"2t"])
        step = pair if pair == b"2\x86" else b"0"
        if step == b"0":  # lists: MARK, twice the last memo, LIST, memo
            body = b"]q\xff" + b"".join(b"0(h\xffh\xff" + pair[1:] + b"q\xff" for _ in range(40))
        else:
            body = text("x") + step * 40
        return self.rng.choice([body, b"}" + body + b"Ns", b"\x8f(" + body + b"\x90"])

    def cycle(self) -> bytes:
        return self.rng.choice([b"]q\xfeh\xfea", b"}q\xfe" + text("x") + b"h\xfes", b"]q\xfe(h\xfeh\xfeh\xfee"])

    def deep(self) -> bytes:
        body = self.rng.choice([b"N" + b"\x85" * 20_000, b"]" * 2000 + b"a" * 1999, text("x") + b"\x85" * 30])
        return self.rng.choice([body, b"}" + body + b"Ns"])

    def module(self) -> bytes:
        """A module as EDM and IMM pickle it, with something odd in one of its places."""
        names = ("_parameters", "_buffers", "_modules", "_init_kwargs", "_non_persistent_buffers_set")
        state = dict.fromkeys(names, b"}")
        state[self.rng.choice(list(state))] = self.value()
        pairs = b"".join(text(name) + value for name, value in state.items())
        meta = b"}(" + text("type") + text("class") + text("class_name") + text("EDMPrecond") + text("state")
        meta += b"}(" + pairs + b"u" + b"u"
        return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R"

    def whole(self) -> bytes:
        """A whole pickle: the value alone, in a dict, as a module, or cut and damaged."""
        body = self.rng.choice(
            [
                lambda: self.value(6),
                lambda: b"}" + text(self.rng.choice(["ema", "model", "x"])) + self.value(5) + b"s",
                lambda: b"}" + text("ema") + self.module() + b"s",
                lambda: b"}(" + text("ema") + self.module() + text("dataset_kwargs") + self.value(4) + b"u",
            ]
        )()
        content = bytearray(b"\x80\x02" + body + b".")
        for _ in range(self.rng.choice([0, 0, 0, 1, 3])):
            content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        return bytes(content[: self.rng.choice([None, None, None, self.rng.randrange(1, len(content) + 1)])])
