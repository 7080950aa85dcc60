"""Reads pickles without running them: a pickle machine that has no way to call anything.

A name in the file becomes a `Global` that stands for itself (names outside the
allow-list are refused); where a pickle would call one, `rebuilders` may say what stands for the result, and otherwise
an inert `Record` does. Byte strings stay in the file as `Span`s. Our own, because torch's weights_only loader refuses
the module pickles of EDM and IMM, and reads every tensor into memory.

What the result unfolds to is not bounded here: a list may hold another one twice. Whoever walks through it spends a
`Budget`. Keys are bounded, because hashing a tuple walks through it.
"""

from __future__ import annotations

import pickletools
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from neon.checkpoints.bounded import Bounded, Span
from neon.checkpoints.limits import MAX_MEMORY, MAX_TEXT_BYTES, Budget, shown

WHOLE_MODULE = (
    ". A module that was pickled whole needs its class; if you trust the file, make a state dict of it where the class "
    "can be imported: torch.save(torch.load(FILE, weights_only=False).state_dict(), 'state.pt')"
)

ALLOWED = re.compile(
    r"""
    (builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|bool|str|complex|object|getattr)
    | collections\.(OrderedDict|defaultdict) | (copyreg|copy_reg)\._reconstructor | _codecs\.encode
    | argparse\.Namespace | typing\.Any | functools\.partial | pathlib\.(_local\.)?(Posix)?Path
    | numpy\.(dtype|ndarray|(core|_core)\.multiarray\.(scalar|_reconstruct))
    | torch\.(Size|device|\w+Storage|float|float\d+(_\w+)?|bfloat16|half|double|u?int\d+|long|bool|complex\d+)
    | torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\.distributed\.checkpoint\.metadata\.(Metadata|(Tensor|Bytes|Chunk)StorageMetadata|TensorProperties)
    | torch\.distributed\.checkpoint\.metadata\.(StorageMeta|MetadataIndex|_MEM_FORMAT_ENCODING)
    | torch\.serialization\._get_layout
    | torch\.distributed\.checkpoint\.filesystem\._StorageInfo
    | torch\.storage\.(_load_from_bytes|UntypedStorage|TypedStorage)
    | torch\.nn\.(modules\.\w+|parameter)\.[A-Z]\w*
    | torch_utils\.persistence\._reconstruct_persistent_obj | dnnlib\.util\.EasyDict
    | omegaconf\.(base|dictconfig|listconfig|nodes)\.[A-Z]\w*
    | timm\.(layers|models)(\.\w+)+\.[A-Z]\w* | einops(\.\w+)*\.[A-Z]\w*
    """,
    re.VERBOSE,
)
"""What a checkpoint may refer to (specs of EDM, IMM and torch.save). None of it is imported or looked up."""
ENUMERATION = "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"
"""The only one that they hold."""


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


Rebuilder = Callable[..., object]
MAX_OPCODES = 15_000_000  # a file of 300,000 tensors has 10 million
MAX_STACK = 500_000  # values that wait to be put somewhere; pickle itself puts away every 1,000
MAX_MARKS = 10_000
MAX_COPIED = 20_000_000  # entries and letters that calls are given; every list(...) of a list copies it
MAX_NUMBER_BYTES = 256
ENTRY_BYTES = 104  # of a dict or set, at most
MAX_KEY_PARTS = 16


def checked_keys(keys: Iterable[object]) -> None:
    """Raises ValueError unless all keys are of the kinds that published files use: hashing them is then cheap."""
    for key in keys:
        if type(key) is str:
            continue
        parts = key if isinstance(key, tuple) else (key,)
        flat = all(isinstance(part, (str, int, float, bytes, type(None), Global, Record)) for part in parts)
        if len(parts) > MAX_KEY_PARTS or not flat:
            raise ValueError(f"it uses {shown(key)} as a key, which no checkpoint needs: refused")


class Machine:
    """One pickle, from the file's position to its STOP.

    rebuilders: name -> the function of ours that runs instead of the named one; persistent: the function that runs for
    every reference to data outside of the pickle.
    """

    def __init__(self, file: Bounded, rebuilders: Mapping[str, Rebuilder], persistent: Rebuilder | None = None) -> None:
        self.file = file
        self.rebuilders = rebuilders
        self.persistent = persistent
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below the open marks
        self.memo: dict[int, object] = {}
        self.copied = Budget(MAX_COPIED, "copied entries")
        self.memory = Budget(MAX_MEMORY, "bytes")

    def load(self) -> object:
        """The pickled value. Raises ValueError if the pickle is damaged or refers to a name that is not allowed."""
        read, handlers, memory = self.file.read, HANDLERS, self.memory
        try:
            for _ in range(MAX_OPCODES):
                code = read(1)
                if code == b".":
                    return self.stack.pop()
                if code not in handlers:
                    raise ValueError(f"opcode {code!r} has no place in a checkpoint: refused")
                memory.spend(WEIGHTS.get(code, 16))
                handlers[code](self)
                if len(self.stack) > MAX_STACK:
                    raise ValueError(f"it leaves {MAX_STACK:,} values unused: refused as hostile")
        except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"damaged pickle near byte {self.file.tell()} ({type(error).__name__}: {shown(str(error))})"
            ) from error
        raise ValueError(f"it has more than {MAX_OPCODES:,} steps: refused as hostile")

    def length(self, num_bytes: int, most: int) -> int:
        """A length that the file holds, at most `most`."""
        length = int.from_bytes(self.file.read(num_bytes), "little")
        if length > most:
            raise ValueError(f"a text or number of {length} bytes has no place in a checkpoint: refused")
        return length

    def push_span(self, length_bytes: int) -> None:
        length = int.from_bytes(self.file.read(length_bytes), "little")
        self.file.require(length)
        self.stack.append(Span(self.file.tell(), length))
        self.file.seek(self.file.tell() + length)

    def push_text(self, length_bytes: int, encoding: str) -> None:
        content = self.file.read(self.length(length_bytes, MAX_TEXT_BYTES))
        self.push_sized(str(content, encoding, "surrogatepass" if encoding == "utf-8" else "strict"))

    def push_sized(self, value: object) -> None:
        """Push a text or number, whose memory depends on its content."""
        self.memory.spend(sys.getsizeof(value))
        self.stack.append(value)

    def push_long(self, length_bytes: int) -> None:
        content = self.file.read(self.length(length_bytes, MAX_NUMBER_BYTES))
        self.push_sized(int.from_bytes(content, "little", signed=True))

    def push_global(self) -> None:
        module, name = (self.file.readline()[:-1].decode() for _ in range(2))
        self.memory.spend(len(module) + len(name))
        self.stack.append(self.resolve(f"{module}.{name}"))

    def mark(self) -> None:
        if len(self.outer) > MAX_MARKS:
            raise ValueError(f"it is nested deeper than {MAX_MARKS:,}: refused as hostile")
        self.outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list:
        values, self.stack = self.stack, self.outer.pop()
        return values

    def pop(self, count: int) -> list:
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        return values

    def collect(self, kind: Callable[[list], object]) -> None:
        """A tuple, list or set of everything above the mark."""
        values = self.pop_to_mark()
        self.stack.append(kind(values))

    def new_dict(self) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def call(self, count: int) -> None:
        function, args, *_ = self.pop(count)
        self.stack.append(self.rebuild(function, args))

    def refer(self) -> None:
        if self.persistent is None:
            raise ValueError("it refers to data outside of the pickle: refused")
        self.stack.append(self.persistent(*self.pop(1)))

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
        if function.name.endswith(".getattr"):  # how Python 3.11.0 to 3.11.3 writes a member of an enumeration
            if len(args) != 2 or args[0] != Global(ENUMERATION) or not isinstance(args[1], str):
                raise ValueError(f"it calls '{function.name}', which no checkpoint needs: refused, and nothing was run")
            return Record(ENUMERATION, args[1:])
        rebuilder = self.rebuilders.get(function.name)
        self.copied.spend(sum(len(arg) for arg in args if isinstance(arg, (str, bytes, list, tuple, dict, set))))
        return rebuilder(*args) if rebuilder else Record(function.name, args)

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # attributes of an OrderedDict (state dicts have `_metadata`) are not needed
            raise ValueError(f"it gives a state to a {type(target).__name__}: refused")

    def set_items(self, values: list) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Record) else target
        if not isinstance(items, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}: refused")
        checked_keys(values[::2])
        self.memory.spend(ENTRY_BYTES * (len(values) // 2))
        items.update(zip(values[::2], values[1::2], strict=True))

    def extend(self, values: list) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            self.memory.spend(ENTRY_BYTES * len(values))
            target.update(set_of(values))
        else:
            raise ValueError(f"it appends to a {type(target).__name__}: refused")

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        self.stack.append(self.memo[key])


def set_of(values: Iterable[object] = ()) -> set:
    entries = list(values)
    checked_keys(entries)
    return set(entries)


Handler = Callable[[Machine], object]


def pushing(make: Callable[[], object]) -> Handler:
    return lambda m: m.stack.append(make())


def number(format: str) -> Handler:
    unpack, size = struct.Struct(format).unpack, struct.calcsize(format)
    return lambda m: m.stack.append(unpack(m.file.read(size))[0])


def line(read: Callable[..., object]) -> Handler:
    return lambda m: m.push_sized(read(m.file))


def index(size: int) -> Callable[[Machine], int]:
    return lambda m: int.from_bytes(m.file.read(size), "little")


def index_line(m: Machine) -> int:
    return int(m.file.readline()[:20])


HANDLERS: dict[bytes, Handler] = {
    b"\x80": lambda m: m.file.read(1),  # the protocol
    b"\x95": lambda m: m.file.read(8),  # a frame only announces how much to buffer
    b"N": pushing(lambda: None), b"\x88": pushing(lambda: True), b"\x89": pushing(lambda: False),
    b")": pushing(tuple), b"]": pushing(list), b"}": pushing(dict), b"\x8f": pushing(set),
    b"K": number("<B"), b"M": number("<H"), b"J": number("<i"), b"G": number(">d"),
    b"I": line(pickletools.read_decimalnl_short), b"L": line(pickletools.read_decimalnl_long),
    b"F": line(pickletools.read_floatnl), b"S": line(pickletools.read_stringnl),
    b"V": line(pickletools.read_unicodestringnl),
    b"\x8a": lambda m: m.push_long(1), b"\x8b": lambda m: m.push_long(4),
    b"U": lambda m: m.push_text(1, "latin-1"), b"T": lambda m: m.push_text(4, "latin-1"),
    b"\x8c": lambda m: m.push_text(1, "utf-8"), b"X": lambda m: m.push_text(4, "utf-8"),
    b"\x8d": lambda m: m.push_text(8, "utf-8"),
    b"C": lambda m: m.push_span(1), b"B": lambda m: m.push_span(4), b"\x8e": lambda m: m.push_span(8),
    b"p": lambda m: m.remember(index_line(m)), b"q": lambda m: m.remember(index(1)(m)),
    b"r": lambda m: m.remember(index(4)(m)), b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.recall(index_line(m)), b"h": lambda m: m.recall(index(1)(m)),
    b"j": lambda m: m.recall(index(4)(m)),
    b"(": Machine.mark, b"0": lambda m: m.stack.pop(), b"1": Machine.pop_to_mark,
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"t": lambda m: m.collect(tuple), b"l": lambda m: m.collect(list),
    b"\x91": lambda m: m.collect(lambda values: frozenset(set_of(values))), b"d": Machine.new_dict,
    b"\x85": lambda m: m.stack.append(tuple(m.pop(1))), b"\x86": lambda m: m.stack.append(tuple(m.pop(2))),
    b"\x87": lambda m: m.stack.append(tuple(m.pop(3))),
    b"a": lambda m: m.extend(m.pop(1)), b"e": lambda m: m.extend(m.pop_to_mark()),
    b"\x90": lambda m: m.extend(m.pop_to_mark()),
    b"s": lambda m: m.set_items(m.pop(2)), b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"c": Machine.push_global, b"\x93": lambda m: m.stack.append(m.resolve(".".join(m.pop(2)))),
    b"R": lambda m: m.call(2), b"\x81": lambda m: m.call(2), b"\x92": lambda m: m.call(3),
    b"b": Machine.build, b"Q": Machine.refer,
}  # fmt: skip
"""opcode -> what it does. Those of persistent text ids, extensions, instances and out-of-band buffers are refused."""
WEIGHTS = {
    **dict.fromkeys((b"K", b"N", b")", b"h", b"j", b"g", b"2", b"\x88", b"\x89", b"0", b"Q", b"b", b"a", b"e"), 8),
    **dict.fromkeys((b"M", b"J", b"G"), 40),
    **dict.fromkeys((b"(", b"]", b"l", b"}", b"d", b"t", b"\x85", b"\x86", b"\x87"), 88),
    **dict.fromkeys((b"p", b"q", b"r", b"\x94"), 104),
    **dict.fromkeys((b"\x8f", b"\x91", b"C", b"B", b"\x8e", b"c", b"\x93"), 240),
    **dict.fromkeys((b"R", b"\x81", b"\x92"), 350),
}  # fmt: skip
"""opcode -> the bytes that it takes in memory at most (16 by default), beside texts and entries of dicts."""
