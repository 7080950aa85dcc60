"""Folders of the Hub: which files hold weights, in transformers' and diffusers' layout, and which lie beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neon.checkpoints.limits import clean, first_of

WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model|adapter_model|pytorch_lora_weights)"
    r"(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)
"""model.safetensors, diffusion_pytorch_model.fp16.safetensors, model.safetensors.index.fp16.json, ..."""
DISTRIBUTED = ".metadata"
"""What torch.distributed.checkpoint calls the table of contents of a folder."""
ANY_WEIGHTS = re.compile(r".*\.(safetensors|bin|pth|pt|ckpt|msgpack|h5|onnx|gguf)(\.index(\.\w+)?\.json)?")


@dataclass(frozen=True)
class Component:
    """One network of a folder. part: the subfolder ("" for the folder itself); entry: its index or only file."""

    part: str
    entry: Path

    @property
    def target(self) -> str:
        """The name of the safetensors file (or index) that holds the same weights."""
        return safetensors_name(self.entry.name)


def safetensors_name(name: str) -> str:
    """What a weight file is called as safetensors: pytorch_model-00001-of-00002.bin is model-00001-of-00002.safetensors
    for transformers; diffusers keeps its stem."""
    if not name.startswith("diffusion_") and ".bin" in name:
        name = name.replace("pytorch_model", "model", 1)
    return name.replace(".bin", ".safetensors", 1)


def components(folder: Path, variant: str | None = None) -> list[Component]:
    """Every network in a folder and its subfolders. Of one network, safetensors come before .bin, an index before a
    single file, and the files of `variant` (say, "fp16") before the plain ones, which come before other variants.

    Raises ValueError if there is none, or none of the variant.
    """
    found, variants = [], set()
    for part in sorted([folder, *(inner for inner in folder.iterdir() if inner.is_dir() and inner.name[0] != ".")]):
        matches = [(match, path) for path in sorted(part.iterdir()) if (match := WEIGHTS.fullmatch(path.name))]
        if not matches:
            continue

        variants |= {match["variant"] or match["index_variant"] for match, _ in matches}

        def order(candidate: tuple[re.Match[str], Path]) -> tuple[bool, bool, bool, bool]:
            match, _ = candidate
            own = match["variant"] or match["index_variant"]
            return own != variant, own is not None, match["kind"] != "safetensors", not match["index"]

        _, entry = min(matches, key=order)
        found.append(Component("" if part == folder else part.name, entry))
    if not found:
        raise ValueError(f"{clean(str(folder))} holds no weights that are known (model.safetensors, its index, ...)")
    if variant not in {None, *variants}:
        raise ValueError(f"{clean(str(folder))} holds no file of variant {variant!r}")
    return found


def only_entry(folder: Path) -> Path:
    """The weight file of a folder with one network, or the table of contents of a distributed checkpoint. Raises
    FileNotFoundError if it holds none or several."""
    if (folder / DISTRIBUTED).is_file():
        return folder / DISTRIBUTED
    try:
        found = components(folder)
    except ValueError as error:
        raise FileNotFoundError(f"no checkpoint {clean(str(folder))}: it is a folder, name a file in it") from error
    if len(found) > 1:
        parts = first_of([component.part or "." for component in found], 8)
        raise FileNotFoundError(
            f"no checkpoint {clean(str(folder))}: it is a folder of several networks, name one: {parts}"
        )
    return found[0].entry


def side_files(folder: Path) -> Iterator[Path]:
    """Everything that is no weight file, relative to the folder: configs, tokenizers, schedulers, the model card."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and not ANY_WEIGHTS.fullmatch(path.name):
            yield relative


def check_new(path: Path) -> None:
    """Raises ValueError or FileNotFoundError unless a folder can be made at `path`."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already; name a new folder, or a file that ends in .safetensors")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.absolute().parent}")
