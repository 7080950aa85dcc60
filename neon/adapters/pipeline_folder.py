"""A diffusers pipeline folder: what it is made of, its hash, a copy of it with other weights. No code in it runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from neon.checkpoints import checkpoint
from neon.store import files

DENOISERS = ("unet", "transformer")
"""The component that Neon trains and moves, by its name in model_index.json."""
UNUSED = "safety_checker"
"""The component that is copied and never loaded: S are the network's own images, none of them blacked out."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.ckpt", "*.msgpack", "*.h5")


@dataclass(frozen=True)
class PipelineFolder:
    """A folder with a model_index.json, checked: every component is a class of diffusers or transformers."""

    path: Path
    index: Mapping[str, object]

    @classmethod
    def open(cls, path: Path) -> PipelineFolder:
        """Raises FileNotFoundError if it is no pipeline folder, ValueError if a component needs code of its own or a
        package that is not there."""
        file = path / "model_index.json"
        if not file.is_file():
            near = [folder for folder in (path.parent, path / "pipeline") if (folder / file.name).is_file()]
            advice = f"Did you mean {near[0]}?" if near else "Save one with pipeline.save_pretrained(FOLDER)"
            raise FileNotFoundError(
                f"{path}: expected a diffusers pipeline folder, but there is no model_index.json in it. {advice}"
            )
        index = read_table(file)
        class_of_diffusers(index.get("_class_name"), diffusers.DiffusionPipeline, f"{file}: _class_name")
        folder = cls(path, index)
        for part, (library, class_name) in folder.parts.items():
            if library not in ("diffusers", "transformers") and part != UNUSED:
                raise ValueError(
                    f"{file}: {part} is {class_name!r} of {library!r}; only classes of diffusers and transformers are "
                    "loaded, code beside the weights is never run"
                )
            check_installed(getattr(diffusers, str(class_name), None), f"{file}: {part}")
        folder.denoiser  # noqa: B018 - a pipeline without one is said now
        return folder

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Component -> (library, class), without the absent ones."""
        pairs = {k: v for k, v in self.index.items() if isinstance(v, list) and len(v) == 2}
        return {part: (library, name) for part, (library, name) in pairs.items() if isinstance(library, str)}

    @property
    def denoiser(self) -> str:
        """Name of the component that is trained."""
        found = [name for name in DENOISERS if name in self.parts]
        if len(found) != 1:
            raise ValueError(
                f"{self.path}: expected one denoiser ({' or '.join(DENOISERS)}), found {', '.join(found) or 'none'} "
                f"among {', '.join(self.parts)}"
            )
        return found[0]

    @property
    def denoiser_config(self) -> Mapping[str, object]:
        """The constructor arguments of the denoiser."""
        return read_table(self.path / self.denoiser / "config.json")

    @cached_property
    def sha256(self) -> str:
        """Over names and contents of model_index.json and of every file of the components."""
        inside = [file for part in self.parts for file in (self.path / part).rglob("*") if file.is_file()]
        lines = [f"{file.relative_to(self.path)} {files.sha256_of(file)}" for file in sorted(inside)]
        lines.append(files.sha256_of(self.path / "model_index.json"))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def variant(self) -> str | None:
        """ "fp16" if the denoiser's weights are there under that name only."""
        names = [file.name for pattern in WEIGHT_FILES for file in (self.path / self.denoiser).glob(pattern)]
        if not names:
            raise FileNotFoundError(f"{self.path / self.denoiser}: there are no weights in it")
        return "fp16" if all(".fp16." in name for name in names) else None

    @property
    def dtype(self) -> torch.dtype:
        """In which most of the denoiser's numbers are stored."""
        tag = f".{self.variant}" if self.variant else ""
        stem = self.path / self.denoiser / "diffusion_pytorch_model"
        endings = (f"{tag}.safetensors", f".safetensors.index{tag}.json", f"{tag}.bin", f".bin.index{tag}.json")
        found = next((file for end in endings if (file := Path(f"{stem}{end}")).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{stem}.safetensors: no such file (nor .bin, nor an index of shards)")
        counts: Counter[torch.dtype] = Counter()
        for spec in checkpoint.read(found, weights="any").specs.values():
            counts[spec.dtype] += spec.numel() if spec.is_floating_point() else 0
        return counts.most_common(1)[0][0]

    def read_model(self) -> diffusers.ModelMixin:
        """The denoiser in float32, on the CPU, by diffusers' own reader (which knows the names of older files).

        Raises ValueError if the file does not hold exactly the network's weights.
        """
        diffusers.utils.logging.disable_progress_bar()  # bars are for terminals: neon/runtime/progress.py
        where = self.path / self.denoiser
        kind = class_of_diffusers(self.parts[self.denoiser][1], diffusers.ModelMixin, str(where))
        model, found = kind.from_pretrained(
            where, dtype=torch.float32, variant=self.variant, local_files_only=True, output_loading_info=True
        )
        wrong = {key: names for key, names in found.items() if names}
        if wrong:
            first = {key: str(next(iter(names))) for key, names in wrong.items()}
            raise ValueError(
                f"{where}: its weights are not those of the {type(model).__name__} in config.json: {first}"
            )
        return model

    def open_pipeline(self, model: nn.Module, device: torch.device) -> diffusers.DiffusionPipeline:
        """The pipeline with `model` as its denoiser, in float32."""
        without = {UNUSED: None, "requires_safety_checker": False} if UNUSED in self.parts else {}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.path,
            dtype=torch.float32,
            variant=self.variant,
            local_files_only=True,
            **{self.denoiser: model, **without},
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def write_with(self, weights: Mapping[str, Tensor], target: Path) -> None:
        """A copy of the folder in which the denoiser has these weights, in the dtype in which the original is stored.
        It appears whole or not at all."""
        model = self.read_model()
        model.load_state_dict(weights, strict=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        patterns = shutil.ignore_patterns(*WEIGHT_FILES)

        def ignore(folder: str, names: list[str]) -> set[str]:
            return patterns(folder, names) if Path(folder) == self.path / self.denoiser else set()

        try:
            beside.mkdir(parents=True)
            shutil.copy2(self.path / "model_index.json", beside)
            for part in self.parts:
                if (self.path / part).is_dir():
                    shutil.copytree(self.path / part, beside / part, ignore=ignore)
            model = model if self.dtype == torch.float32 else model.to(self.dtype)
            model.save_pretrained(beside / self.denoiser, variant=self.variant)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def read_table(file: Path) -> Mapping[str, object]:
    """A JSON object. Raises FileNotFoundError, or ValueError for anything else."""
    try:
        table = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(table).__name__}")
    return table


def class_of_diffusers(name: object, kind: type, where: str) -> diffusers.ConfigMixin:
    """The class called `name`, a subclass of diffusers' `kind`. Raises ValueError, naming `where` it was read."""
    found = getattr(diffusers, str(name), None)
    if _is_kind(found, kind):
        return found
    check_installed(found, where)
    known = {one.lower(): one for one in dir(diffusers)}
    near = [known[one] for one in get_close_matches(str(name).lower(), list(known), n=5, cutoff=0.8)]
    meant = [one for one in near if _is_kind(getattr(diffusers, one), kind)]
    advice = f" (did you mean {meant[0]!r}?)" if meant else ""
    raise ValueError(f"{where}: {name!r} is no {kind.__name__} class of diffusers{advice}")


def check_installed(found: object, where: str) -> None:
    """Raise ValueError if `found` is what diffusers has in place of a class that needs a package which is not there."""
    if isinstance(found, diffusers.utils.DummyObject):
        try:
            diffusers.utils.requires_backends(found, found._backends)
        except ImportError as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def _is_kind(found: object, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)
