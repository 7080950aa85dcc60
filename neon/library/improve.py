"""`neon.improve`: the whole of Neon on a network in memory, given by functions. It is `neon run` without a config."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from neon.checkpoints import checkpoint
from neon.library.evaluate import references
from neon.library.fingerprint import fingerprint
from neon.library.functions import (
    Functions,
    Loss,
    Sample,
    Score,
    check_per_image,
    check_range,
    check_takes,
    function_score,
)
from neon.pipeline.experiment import parse
from neon.pipeline.run import Run
from neon.quantize import Rule
from neon.runtime.distributed import World
from neon.runtime.progress import say
from neon.store.files import folder_lock
from neon.training.recipe import Training

FAMILY = "neon.improve"
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Of whole models, by the class's name: torch.compile's too; and under which name each holds the model."""


@dataclass(frozen=True, kw_only=True)
class Improved:
    """What `neon.improve` found."""

    weights: dict[str, Tensor]
    """The improved state dict, on the CPU: base - w (self-trained - base)."""
    w: float
    """The step that scored best on the selection seeds; 0 if none was better than the base."""
    curve: list[tuple[float, float]]
    """(w, score) on the selection seeds in the order of w: w = -1 is the self-trained model, w = 0 the base. NaN where
    the images were no numbers. Of strategy "search": without the bias of few images, by all that a point was given."""
    scores: dict[str, float]
    """On held-out seeds: "base", "self-trained", "random direction" (a control: as far, anywhere) and "neon"."""
    details: dict
    """Everything else, as `neon run` writes it into result.json."""


def improve(
    model: nn.Module,
    *,
    sample: Sample,
    loss: Loss,
    score: Score | str | Path | Mapping[str, str],
    num_synth: int,
    updates: int,
    lr: float,
    batch: int = 64,
    w: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    strategy: Literal["grid", "search"] = "grid",
    num_select: int | None = None,
    num_report: int | None = None,
    synth_seed: int = 0,
    select_seed: int = 1_000_000,
    report_seed: int = 2_000_000,
    sample_batch: int = 64,
    uint8: Rule = "round",
    finetune: Mapping[str, object] | None = None,
    folder: str | Path | None = None,
) -> Improved:
    """Improve a trained generator by a step away from its own samples (arXiv 2510.03597, Algorithm 1).

    Samples `num_synth` images, fine-tunes a copy for `updates` updates on them, searches w on fresh seeds and reports
    the result, the base and two controls on held-out ones. The model itself is not changed.

    model: any module that copy.deepcopy copies; parameters that do not require a gradient stay what they are (a LoRA's
        base).
    sample: (model, seeds) -> images (B, ...), or (images, labels). Image b depends on seeds[b] alone.
    loss: (model, images, labels, generator) -> (B,), the loss that the model was trained with. images are what `sample`
        returned; all randomness comes from the generator (on the CPU).
    score: images (N, ...) -> float, smaller is better; or a reference file made by `neon fid ref`, for the Frechet
        distance to it; or several, {extractor: file}, the first of which chooses.
    lr: constant; a tenth of the last rate of training is a beginning. batch: images per update.
    w: the steps to try; w = 0 (the base), w = -1 (the self-trained model) and a random direction are always there.
    strategy: "grid" scores every w on all images. "search" takes w as the range to begin with and stops when a better
        place could not be seen (neon/search/options.py); it tells gain from noise by the images' features, so it needs
        a reference file: a function of yours gives one number per set of images, and there is nothing to tell it by.
    num_select, num_report: images that every w, and the final rows, are scored on; None: as many as num_synth.
    synth_seed, select_seed, report_seed: first seed of each block; they must not overlap.
    uint8: how float images in [-1, 1] are rounded for a reference file's extractor (neon/quantize.py). Bytes stay.
    finetune: further keys of a config's [finetune], for example {"ema_power": 6.94, "optimizer": "adamw"}.
    folder: keeps everything that was computed, the page report.html included; the same call goes on where it was
        interrupted. None: a temporary folder.

    Raises ValueError, before anything is computed, for arguments that do not fit together, a model that cannot be
    copied, functions that take other arguments, a `sample` whose images depend on their batch or (with a reference
    file) are floats outside of [-1, 1], a `loss` that gives no number per image, or a folder that was begun with
    another model, function or setting; and before the fine-tune for a function `score` that gives no number.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be the network, a torch.nn.Module, not {_kind(model)}")
    if not isinstance(w, Iterable):
        raise ValueError(f"w must be a list of the steps to try, for example w=[0.5, 1.0], not {_kind(w)}")
    if named := sorted({"images", "batch", "lr", "objective"} & set(finetune or {})):
        raise ValueError(f"finetune: {named[0]} is said by an argument of neon.improve (updates, batch, lr, loss)")
    if "arch" in (finetune or {}):
        raise ValueError("finetune: arch changes nothing, the model is built already: give one with, say, more dropout")
    device = next(model.parameters(), torch.empty(0)).device
    check_names(model)
    check_takes("sample", sample, "model, seeds")
    check_takes("loss", loss, "model, images, labels, generator")
    example, labels = check_per_image(sample, model, synth_seed)
    is_function = callable(score)
    if is_function:
        check_takes("score", score, "images")
    if isinstance(score, (str, Path, Mapping)):
        check_range(example)
    if is_function and strategy == "search":
        raise ValueError(
            "strategy = 'search' judges noise by features: it needs a reference file as score, no function"
        )
    yardstick = function_score(score, example) if callable(score) else None
    family = Functions(model, sample, loss, None if is_function else uint8)
    has_pictures = (
        example.ndim == 4 and example.shape[1] in (1, 3) and (not is_function or example.dtype == torch.uint8)
    )
    with ExitStack() as stack:
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neon-improve-")))
        else:
            place = Path(folder)
            stack.enter_context(folder_lock(place))
        table: dict[str, object] = {
            "family": FAMILY,
            "base": {"checkpoint": str(place / "base.safetensors"), "weights": "raw"},
            "sampling": {"uint8": "none", "batch": sample_batch, "function": fingerprint(sample)},
            "synth": {"num_images": num_synth, "first_seed": synth_seed, "store": "codes"},
            "finetune": {
                "images": updates * batch,
                "batch": batch,
                "lr": lr,
                **(finetune or {}),
                "objective": {"function": fingerprint(loss), "batch": batch},
            },
            "select": {
                "strategy": strategy,
                "w": list(w),
                "num_images": num_select or num_synth,
                "first_seed": select_seed,
            },
            "report": {
                "num_images": num_report or num_synth,
                "first_seed": report_seed,
                "extractors": {yardstick.extractor.name: "a function"} if yardstick else references(score),
                "num_shown": 64 if has_pictures else 0,
            },
        }
        config = parse(table, family)
        keep_base(model, place / "base.safetensors")
        stack.enter_context(torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]))
        family.try_loss(example, labels, batch, config.need("finetune", Training).precision)
        yardsticks = None if yardstick is None else [yardstick]
        world, is_kept = World(device=device), folder is not None
        run = Run(config, place, world, family=family, yardsticks=yardsticks, is_kept=is_kept)
        details = run.all()
        say(world, str(details["verdict"]))
        merged = checkpoint.read(place / "neon.safetensors", weights="any").tensors
        weights = {name: value.clone() for name, value in merged.items()}
    return improved(details, weights)


def improved(details: dict, weights: dict[str, Tensor]) -> Improved:
    """The numbers of a run's result that one asks for first."""
    select = details["select"]
    if "measured" in select:  # a search gives its points different numbers of images
        curve = sorted((m["w"], math.nan if m["value"] is None else m["value"]) for m in select["measured"])
    else:
        points = [p for p in select["points"] if p["direction"] == "synth"]
        curve = sorted((p["w"], p["metrics"].get(select["metric"], math.nan)) for p in points)
    scores = {name: row["metrics"].get(details["metric"], math.nan) for name, row in details["rows"].items()}
    return Improved(weights=weights, w=details["w"], curve=curve, scores=scores, details=details)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_names(model: nn.Module) -> None:
    """Raise ValueError for a model that cannot be copied, or whose state dict holds more than tensors."""
    for wrapper, inner in WRAPPERS.items():
        if type(model).__name__ == wrapper:
            raise ValueError(f"the model is wrapped ({wrapper}): give the inner one, model.{inner}")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the model's state dict holds {name}, a {type(value).__name__} (get_extra_state?): expected tensors"
            )


def keep_base(model: nn.Module, path: Path) -> None:
    """Write the model's weights, or check that those of a folder that was begun are the same."""
    weights = model.state_dict()
    if not path.is_file():
        checkpoint.write(path, weights, metadata={"family": FAMILY, "arch": {}, "weights": "raw"})
        return
    kept = checkpoint.read(path, weights="raw").tensors
    for name in {**weights, **kept}:
        is_same = name in weights and name in kept and torch.equal(weights[name].cpu(), kept[name])
        if not is_same:
            raise ValueError(
                f"{path.parent} was begun with another model: {name} differs. Give back that model (result.weights is "
                "another one) or choose another folder"
            )
