"""Code that is not this project's: which files a family or an extractor of one's own is written in, and where an error
in them arose."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from fid.files import sha256_of

HERE = Path(__file__).resolve().parent


def shipped() -> list[str]:
    """Names of the families that lie beside this package: folders whose family.py names its FAMILY."""
    files = HERE.parent.glob("*/family.py")
    return sorted(file.parent.name for file in files if "\nFAMILY = " in file.read_text(encoding="utf-8"))


OURS = frozenset({"neon", "fid", *shipped()})
"""The packages of this project."""


def source_sha256(kind: type) -> str | None:
    """SHA-256 of the file in which a family or extractor of one's own is written and of the modules that it imports
    from the same folder, from a folder below or from its own package, and they in turn: an edit there may change every
    value. None for what this project ships (its version is recorded) and for a class that lies in no file.

    Where it imports no such module, it is the hash of the one file.
    """
    if _is_ours(kind.__module__):
        return None
    try:
        name = inspect.getsourcefile(kind)
    except TypeError:  # a class of an interactive session
        return None
    if name is None or not Path(name).is_file():
        return None
    file = Path(name).resolve()
    depth = kind.__module__.count(".") + (file.name == "__init__.py")
    root = file.parents[min(depth, len(file.parents) - 1)]
    found = _with_imported(file, root)
    if found == [file]:
        return sha256_of(file)
    lines = sorted(f"{one.relative_to(root).as_posix()} {sha256_of(one)}" for one in found)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_own(file: str) -> bool:
    """Whether a file is there and neither this project's, Python's nor an installed library's."""
    path = Path(file)
    if not path.is_file() or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    folders = (*(HERE.parent / name for name in OURS), Path(sysconfig.get_path("stdlib")))
    return not any(path.is_relative_to(folder) for folder in folders)


def place(error: BaseException) -> str:
    """The innermost line of a file of one's own in which an error arose or through which it passed,
    " (mine.py:12)", or nothing if there is none."""
    if isinstance(error, SyntaxError) and error.filename is not None and is_own(error.filename):
        return f" ({error.filename}:{error.lineno})"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if is_own(frame.filename)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def told(error: Exception) -> str:
    """What an error in a file of one's own says, with its place, in one line."""
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {words}{place(error)}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


def _with_imported(file: Path, root: Path) -> list[Path]:
    """`file` and all modules under `root` that it imports, anywhere in its text, and they in turn.

    Read from the text: what happens to be imported in this process depends on the command."""
    found, waiting = [file], [file]
    while waiting:
        for name in _imports(waiting.pop(), root):
            base = root / Path(*name.split("."))
            for other in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
                if other.is_file() and other not in found and not _is_ours(name):
                    found.append(other)
                    waiting.append(other)
    return found


def _imports(file: Path, root: Path) -> Iterator[str]:
    """Names of modules that a file may import, packages on the way included. Of `from a import b`: a and a.b."""
    package = ".".join(file.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(file.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # beyond the top: it would fail when it runs
                continue
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: end + 1]) for end in range(len(parts)))
