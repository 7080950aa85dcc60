"""Reads pickles without running them: a pickle machine that has no way to call anything.

`pickletools` decodes the opcodes. A name in the file becomes a `Global` that stands for itself (names outside the
allow-list are refused); where a pickle would call one, `rebuilders` may say what stands for the result, and otherwise
an inert `Record` does. Byte strings stay in the file as `Span`s. Our own, because torch's weights_only loader refuses
the module pickles of EDM and IMM, and reads every tensor into memory.

What the result unfolds to is not bounded here: a list may hold another one twice. Whoever walks through it spends a
`Budget`. Keys are bounded, because hashing a tuple walks through it.
"""

from __future__ import annotations

import io
import pickletools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from neon.checkpoints.lazy import window
from neon.checkpoints.limits import MAX_TEXT_BYTES, Budget, shown

WHOLE_MODULE = (
    ". A module that was pickled whole needs its class; if you trust the file, make a state dict of it where the class "
    "can be imported: torch.save(torch.load(FILE, weights_only=False).state_dict(), 'state.pt')"
)

ALLOWED = re.compile(
    r"""
    (builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|bool|str|complex|object)
    | collections\.(OrderedDict|defaultdict) | (copyreg|copy_reg)\._reconstructor | _codecs\.encode
    | argparse\.Namespace | typing\.Any | functools\.partial | pathlib\.(Posix)?Path
    | numpy\.(dtype|ndarray|(core|_core)\.multiarray\.(scalar|_reconstruct))
    | torch\.(Size|device|\w+Storage|float|float\d+(_\w+)?|bfloat16|half|double|u?int\d+|long|bool|complex\d+)
    | torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\.storage\.(_load_from_bytes|UntypedStorage|TypedStorage)
    | torch\.nn\.(modules\.\w+|parameter)\.[A-Z]\w*
    | torch_utils\.persistence\._reconstruct_persistent_obj | dnnlib\.util\.EasyDict
    | omegaconf\.(base|dictconfig|listconfig|nodes)\.[A-Z]\w*
    | timm\.(layers|models)(\.\w+)+\.[A-Z]\w* | einops(\.\w+)*\.[A-Z]\w*
    """,
    re.VERBOSE,
)
"""What a checkpoint may refer to (specs of EDM, IMM and torch.save). None of it is imported or looked up."""


@dataclass(frozen=True)
class Global:
    """A name that the file refers to."""

    name: str


@dataclass(eq=False)
class Record:
    """What is left of an object: its class's name, constructor arguments, state and items. Nothing of it can run."""

    name: str
    args: tuple = ()
    state: object = None
    items: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Bytes that stay in the file."""

    offset: int
    length: int


class Bounded:
    """A file that refuses, before anything is allocated, to read more than it has.

    It also refuses to be read more than twice over: a small pickle may ask for the same bytes again and again.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        here = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(here)
        self.budget = Budget(2 * self.size + (1 << 20), "bytes")

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int) -> int:
        return self.file.seek(offset)

    def readline(self) -> bytes:
        return self.file.readline(1 << 16)  # only names and numbers end at a line's end

    def read(self, length: int) -> bytes:
        self.require(length)
        self.budget.spend(length)
        return self.file.read(length)

    def require(self, length: int) -> None:
        left = self.size - self.file.tell()
        if length > left:
            raise ValueError(f"it wants {length} more bytes and has {left}: truncated, damaged or hostile")

    def bytes_of(self, value: object) -> bytes:
        """The content of a span (or of bytes that were written as text)."""
        if isinstance(value, bytes):
            return value
        if not isinstance(value, Span):
            raise ValueError(f"expected bytes, found {shown(value)}")
        here = self.file.tell()
        self.file.seek(value.offset)
        content = self.read(value.length)
        self.file.seek(here)
        return content

    def part(self, value: object) -> Bounded:
        """What `bytes_of` gives, as a file of its own; a span is not read for it."""
        if not isinstance(value, Span):
            return Bounded(io.BytesIO(self.bytes_of(value)))
        self.budget.spend(value.length)
        return Bounded(window(self.file, value.offset, value.length))


Rebuilder = Callable[..., object]
MAX_OPCODES = 30_000_000  # a file of 300,000 tensors has 13 million
MAX_COPIED = 50_000_000  # entries and letters that calls are given; every list(...) of a list copies it
MAX_NUMBER_BYTES = 256
MAX_KEY_PARTS = 16
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
ARGUMENTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"} | {
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
LENGTH_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}
TEXT_LENGTH_BYTES = {"BINSTRING": 4, "BINUNICODE": 4, "BINUNICODE8": 8, "LONG4": 4}
PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
GET = {"GET", "BINGET", "LONG_BINGET"}
CALLS = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}


def opcodes(file: Bounded) -> Iterator[tuple[str, object]]:
    """(name, argument) of one opcode after the other, STOP included. Byte strings are skipped: their argument is a
    `Span`. Raises ValueError for a text or number longer than any checkpoint needs."""
    budget = Budget(MAX_OPCODES, "steps of a pickle")
    while True:
        budget.spend()
        start = file.tell()
        opcode = OPCODES.get(file.read(1).decode("latin1"))
        if opcode is None:
            raise ValueError(f"damaged pickle: no opcode at byte {start}")
        name = opcode.name
        if name in LENGTH_BYTES:
            length = int.from_bytes(file.read(LENGTH_BYTES[name]), "little")
            file.require(length)
            yield name, Span(file.tell(), length)
            file.seek(file.tell() + length)
            continue
        if name in TEXT_LENGTH_BYTES:
            length = int.from_bytes(file.read(TEXT_LENGTH_BYTES[name]), "little")
            file.require(length)
            if length > (MAX_NUMBER_BYTES if name == "LONG4" else MAX_TEXT_BYTES):
                raise ValueError(f"a text or number of {length} bytes has no place in a checkpoint: refused")
            file.seek(start + 1)
        yield name, opcode.arg.reader(cast(BinaryIO, file)) if opcode.arg is not None else None
        if name == "STOP":
            return


def checked_keys(keys: Iterable[object]) -> None:
    """Raises ValueError unless all keys are of the kinds that published files use: hashing them is then cheap."""
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        flat = all(isinstance(part, (str, int, float, bytes, type(None), Global, Record)) for part in parts)
        if len(parts) > MAX_KEY_PARTS or not flat:
            raise ValueError(f"it uses {shown(key)} as a key, which no checkpoint needs: refused")


class Machine:
    """One pickle, from the file's position to its STOP.

    rebuilders: name -> what stands for a call of it; persistent: what stands for data outside of the pickle.
    """

    def __init__(self, file: Bounded, rebuilders: Mapping[str, Rebuilder], persistent: Rebuilder | None = None) -> None:
        self.file = file
        self.rebuilders = rebuilders
        self.persistent = persistent
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below the open marks
        self.memo: dict[int, object] = {}
        self.copied = Budget(MAX_COPIED, "copied entries")

    def load(self) -> object:
        """The pickled value. Raises ValueError if the pickle is damaged or refers to a name that is not allowed."""
        try:
            for name, argument in opcodes(self.file):
                if name == "STOP":
                    return self.stack.pop()
                self.step(name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"damaged pickle near byte {self.file.tell()} ({type(error).__name__}: {shown(str(error))})"
            ) from error
        raise ValueError("damaged pickle: it has no end")

    def step(self, name: str, argument: object) -> None:
        """Carry out one opcode."""
        push = self.stack.append
        if name in ARGUMENTS or name in LENGTH_BYTES:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in PUT:
            self.memo[int(argument)] = self.stack[-1]  # type: ignore[call-overload]
        elif name in GET:
            push(self.memo[int(argument)])  # type: ignore[call-overload]
        elif name in CALLS:
            function, args, *_ = self.pop(CALLS[name])
            push(self.rebuild(function, args))
        elif name == "GLOBAL":
            push(self.resolve(str(argument).replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            push(self.resolve(".".join(self.pop(2))))
        elif name not in ("PROTO", "FRAME"):  # a frame only announces how much to buffer
            self.step_container(name)

    def step_container(self, name: str) -> None:
        push, pop = self.stack.append, self.pop
        match name:
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                push(self.stack[-1])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                push({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
            case "TUPLE" | "LIST" | "FROZENSET":
                values = self.pop_to_mark()
                if name == "FROZENSET":
                    checked_keys(values)
                self.stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[name](values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(pop(int(name[-1]))))
            case "DICT":
                values = self.pop_to_mark()
                self.stack.append({})
                self.set_items(values)
            case "APPEND":
                self.extend(pop(1))
            case "APPENDS" | "ADDITEMS":
                self.extend(self.pop_to_mark())
            case "SETITEM":
                self.set_items(pop(2))
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "BUILD":
                self.build(*pop(1))
            case "BINPERSID" if self.persistent is not None:
                push(self.persistent(*pop(1)))
            case _:
                raise ValueError(f"opcode {name} has no place in a checkpoint: refused")

    def resolve(self, name: str) -> Global:
        if not ALLOWED.fullmatch(name):
            foreign = name.partition(".")[0] not in sys.stdlib_module_names and name.rpartition(".")[2][:1].isupper()
            raise ValueError(
                f"it refers to '{shown(name)}', which no checkpoint needs: refused, and nothing of it was run"
                + (WHOLE_MODULE if foreign else "")
            )
        return Global(name)

    def rebuild(self, function: object, args: object) -> object:
        """What stands for `function(*args)`."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError(f"it calls a {type(function).__name__} with a {type(args).__name__}: refused")
        rebuilder = self.rebuilders.get(function.name)
        self.copied.spend(sum(len(arg) for arg in args if isinstance(arg, Sized)))
        return rebuilder(*args) if rebuilder else Record(function.name, args)

    def build(self, state: object) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(
            target, dict
        ):  # the attributes of an OrderedDict (state dicts have `_metadata`) are not needed
            raise ValueError(f"it gives a state to a {type(target).__name__}: refused")

    def set_items(self, values: list) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Record) else target
        if not isinstance(items, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}: refused")
        checked_keys(values[::2])
        items.update(zip(values[::2], values[1::2], strict=True))

    def extend(self, values: list) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            checked_keys(values)
            target.update(values)
        else:
            raise ValueError(f"it appends to a {type(target).__name__}: refused")

    def pop(self, count: int) -> list:
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list:
        values, self.stack = self.stack, self.outer.pop()
        return values
