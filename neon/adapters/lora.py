"""Low-rank fine-tuning by peft: matrices added to a model, and folded into its weights again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ADAPTER = "neon"


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> nn.Module:
    """The model with a pair A, B of rank `rank` beside every layer whose name ends in one of `targets`; B is 0, so
    nothing changes yet. Raises ValueError if there is no such layer, ImportError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install 'neon-generative[diffusers]'") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
