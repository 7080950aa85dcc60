"""Broken and hostile inputs of `neon merge` in the Hub's layouts: functions that make them in a folder and return the
command's arguments."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONE = torch.ones(2, 2)
ADAPTER = {"base_model.model.a.lora_A.weight": ONE, "base_model.model.a.lora_B.weight": ONE}
KOHYA = {"lora_unet_a.lora_down.weight": ONE, "lora_unet_a.lora_up.weight": ONE, "lora_unet_a.alpha": torch.tensor(2.0)}
RUN_ME = "open('ran', 'w').close()"


class Payload:
    """Unpickled by anyone who trusts it, it makes a file `ran`."""

    def __reduce__(self) -> tuple:
        return exec, (RUN_ME,)


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: value.clone() for name, value in tensors.items()}, path, metadata=metadata)
    return path


def state(value: float) -> dict[str, Tensor]:
    return {"a.weight": torch.full((2, 2), value), "b.weight": torch.full((3,), value)}


def sharded(folder: Path, value: float) -> Path:
    """A folder as transformers saves it: two shards, an index, a config."""
    for shard, name in ((FIRST, "a.weight"), (SECOND, "b.weight")):
        save(folder / shard, {name: state(value)[name]}, format="pt")
    write_index(folder, {"a.weight": FIRST, "b.weight": SECOND})
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def indexed(change: Callable[[Path], object]) -> Callable[[Path], list]:
    """`neon merge` of two sharded folders, the base changed."""

    def make(tmp: Path) -> list:
        base, synth = sharded(tmp / "base", 1.0), sharded(tmp / "synth", 2.0)
        change(base)
        return [base, synth, "--out", tmp / "new"]

    return make


def shard_named(name: object) -> Callable[[Path], list]:
    return indexed(lambda base: write_index(base, {"a.weight": name, "b.weight": SECOND}))


def shard_of(content: bytes) -> Callable[[Path], list]:
    return indexed(lambda base: (base / FIRST).write_bytes(content))


def header(entries: object, data: int = 16) -> bytes:
    text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(**changes: object) -> bytes:
    return header({"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}})


def replaced(make: Callable[[Path], object]) -> Callable[[Path], list]:
    """The first shard is something else than a file: made by `make` at its path."""

    def change(base: Path) -> None:
        (base / FIRST).unlink()
        make(base / FIRST)

    return indexed(change)


def files(base: object, synth: object, *more: str, suffix: str = ".pt") -> Callable[[Path], list]:
    """`neon merge` of two files saved by torch, over an older output."""

    def make(tmp: Path) -> list:
        for name, value in (("base", base), ("synth", synth)):
            path = tmp / f"{name}{suffix}"
            path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
        out = save(tmp / "out.safetensors", state(7.0))
        return [tmp / f"base{suffix}", tmp / f"synth{suffix}", "--out", out, *more]

    return make


def adapted(
    tensors: dict[str, Tensor], config: object = None, *more: str, metadata: dict[str, str] | None = None
) -> Callable[[Path], list]:
    """`neon merge BASE ADAPTER`; config: of PEFT, as JSON or as text."""

    def make(tmp: Path) -> list:
        base = save(tmp / "base.safetensors", state(1.0))
        adapter = save(tmp / "lora" / "adapter_model.safetensors", tensors, **(metadata or {}))
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            adapter.with_name("adapter_config.json").write_text(text)
        out = tmp / "new" if config is not None and not more else save(tmp / "out.safetensors", state(7.0))
        return [base, adapter.parent, "--out", out, *more]

    return make


def distributed(change: Callable[[Path], object]) -> Callable[[Path], list]:
    """`neon merge` of folders of torch.distributed.checkpoint, the base changed."""

    def make(tmp: Path) -> list:
        for name, value in (("base", 1.0), ("synth", 2.0)):
            dcp.save({"model": state(value)}, checkpoint_id=tmp / name)
        change(tmp / "base")
        return [tmp / "base", tmp / "synth", "--out", save(tmp / "out.safetensors", state(7.0))]

    return make


def table(change: Callable[[object], object]) -> Callable[[Path], list]:
    """A distributed checkpoint whose table of contents (written by torch, read by us) is changed."""

    def rewrite(folder: Path) -> None:
        held = pickle.loads((folder / ".metadata").read_bytes())  # our own file
        change(held)
        (folder / ".metadata").write_bytes(pickle.dumps(held))

    return distributed(rewrite)


def piece(held: object) -> object:
    return next(info for index, info in held.storage_data.items() if index.fqn == "model.a.weight")


def metadata_of(content: bytes) -> Callable[[Path], list]:
    return distributed(lambda folder: (folder / ".metadata").write_bytes(content))


def recursive() -> dict:
    held: dict = {"model": {}}
    held["model"]["model"] = held["model"]
    return held


def pipeline(change: Callable[[Path], object], *more: str) -> Callable[[Path], list]:
    """`neon merge` of two folders of a U-Net and an autoencoder, the self-trained one changed."""

    def make(tmp: Path) -> list:
        for name, value in (("base", 1.0), ("synth", 2.0)):
            (tmp / name).mkdir()
            for part in ("unet", "vae"):
                save(tmp / name / part / "diffusion_pytorch_model.safetensors", state(value), format="pt")
        change(tmp / "synth")
        return [tmp / "base", tmp / "synth", "--out", tmp / "new", *more]

    return make


def unet(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def there_already(tmp: Path) -> list:
    (tmp / "mine").mkdir()
    (tmp / "mine" / "thesis.txt").write_text("x")
    return [sharded(tmp / "base", 1.0), sharded(tmp / "synth", 2.0), "--out", tmp / "mine"]


def no_folder(tmp: Path) -> list:
    return [sharded(tmp / "base", 1.0), sharded(tmp / "synth", 2.0), "--out", tmp / "nowhere" / "new"]
