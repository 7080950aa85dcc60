"""Low-rank fine-tuning by peft: matrices added to a model, folded into its weights, and taken out of them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from neon.checkpoints import checkpoint
from neon.checkpoints.lora import CONFIG, PEFT_PREFIX
from neon.seeds import global_seed
from neon.store import files

ADAPTER = "neon"


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> nn.Module:
    """The model with a pair A, B of rank `rank` beside every layer whose name ends in one of `targets`; B is 0, so
    nothing changes yet. Raises ValueError if there is no such layer, ImportError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install 'neon-generative[diffusers]'") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    with global_seed(seed):
        adapted: nn.Module = inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    return adapted


def folded(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with LoRA matrices under the plain model's names: W + scale B A, linear and convolutional layers."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        layer, is_wrapped, rest = name.partition(".base_layer.")
        a = state.get(f"{layer}.lora_A.{ADAPTER}.weight") if is_wrapped and rest == "weight" else None
        if a is not None:
            b = state[f"{layer}.lora_B.{ADAPTER}.weight"]
            update = torch.tensordot(b.flatten(1), a, dims=1)
            value = value + scale * update.view_as(value)
        plain[name.replace(".base_layer.", ".")] = value
    return plain


def write_adapter(
    folder: Path, base: Mapping[str, Tensor], weights: Mapping[str, Tensor], rank: int, part: str | None
) -> None:
    """The low-rank update from `base` to `weights`, as a file of its own in a new `folder`.

    part: the network's name in a pipeline that loads LoRA files (pipeline.load_lora_weights(folder)); None: PEFT's
    layout (PeftModel.from_pretrained(network, folder)). Its scale is 1 in both.
    Raises ValueError if an update is not of this rank.
    """
    tensors: dict[str, Tensor] = {}
    modules = []
    for name, value in weights.items():
        if torch.equal(value, base[name]):
            continue
        module = name.removesuffix(".weight")
        down, up = factors(name, base[name], value, rank)
        prefix = PEFT_PREFIX if part is None else f"{part}."
        tensors |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
        modules.append(module)
    shutil.rmtree(folder, ignore_errors=True)
    if not modules:
        return
    folder.mkdir()
    if part is not None:
        checkpoint.write(folder / "pytorch_lora_weights.safetensors", tensors, metadata={"kind": "lora"})
        return
    checkpoint.write(folder / "adapter_model.safetensors", tensors, metadata={"kind": "lora"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "inference_mode": True}
    files.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def factors(name: str, base: Tensor, value: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, inputs, ...), B (outputs, rank, ...) with base + B A = value but for float32's rounding of the two."""
    update = (value.double() - base.double()).flatten(1)
    with global_seed(0):  # of the subspace it begins with
        u, s, v = torch.svd_lowrank(update, q=min(rank, *update.shape), niter=4)
    lost = (update - u * s @ v.T).abs().max()
    if lost > 32 * torch.finfo(torch.float32).eps * max(base.abs().max(), value.abs().max()):
        raise ValueError(f"the update of {name} is not of rank {rank}: {lost:.2g} of it would be lost")
    missing = rank - len(s)  # where a layer is narrower than the rank
    down = nn.functional.pad((v * s.sqrt()).T, (0, 0, 0, missing))
    up = nn.functional.pad(u * s.sqrt(), (0, missing))
    ones = [1] * (base.ndim - 2)
    return down.reshape(rank, *base.shape[1:]).float(), up.reshape(-1, rank, *ones).float()
