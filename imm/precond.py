"""IMMPrecond: one network evaluation takes x at time t to x at any earlier time s.

Zhou et al. 2025 (arXiv 2503.07565), section 4. Times stay in the caller's dtype (float64 in training), the network sees
float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from imm.dit import PATCH_SIZES, SIZES, DiT
from imm.schedule import SCHEDULES, Schedule
from imm.unet import DhariwalUNet, SongUNet

NETWORKS: dict[str, type[nn.Module]] = {"DiT": DiT, "SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
PRESET_SIZES = {f"DiT_{size}_{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in PATCH_SIZES}
F_TYPES = ("euler_fm", "simple_edm", "identity")
# arguments that stored constructors carry and that never had an effect
WITHOUT_EFFECT = {"skip", "share_tsemb"}


class IMMPrecond(nn.Module):
    """f(x_t, t, s): the network between its input scaling and its output map. Arguments are those that checkpoints
    store.

    noise_schedule: fm (alpha = 1 - t, sigma = t) or vp_cosine.
    f_type: euler_fm (the network is a velocity), simple_edm (a direction on the sphere) or identity (the clean data).
    temb_type: the input of the second time embedding: s for identity, t - s for stride. State dicts do not show which.
    eps, T: the least and greatest time of training and sampling.
    mixed_precision: kept because checkpoints store it, without effect: a run's precision is the caller's autocast.
    model_kwargs: arguments of the network.

    Raises ValueError for an unknown choice or an argument that no IMM network has (the original ignored misspelt ones).
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        mixed_precision: str | None = None,
        noise_schedule: str = "fm",
        model_type: str = "SongUNet",
        sigma_data: float = 0.5,
        f_type: str = "euler_fm",
        T: float = 0.994,
        eps: float = 0.0,
        temb_type: str = "identity",
        time_scale: float = 1000.0,
        **model_kwargs: object,
    ):
        super().__init__()
        _expect("noise_schedule", noise_schedule, SCHEDULES)
        _expect("f_type", f_type, F_TYPES)
        _expect("temb_type", temb_type, ("identity", "stride"))
        _expect("mixed_precision", mixed_precision, (None, "fp16", "bf16"))
        if f_type == "euler_fm" and noise_schedule != "fm":
            raise ValueError(f"f_type 'euler_fm' needs noise_schedule 'fm', got {noise_schedule!r}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.schedule: Schedule = SCHEDULES[noise_schedule]
        self.sigma_data, self.f_type, self.T, self.eps = sigma_data, f_type, T, eps
        self.temb_type, self.time_scale = temb_type, time_scale
        self.nt_low, self.nt_high = (
            self.schedule.log_nt(torch.tensor(t, dtype=torch.float64, device="cpu")).exp().item() for t in (eps, T)
        )
        interface = {
            "img_resolution": img_resolution,
            "in_channels": img_channels,
            "out_channels": img_channels,
            "label_dim": label_dim,
        }
        self.model = build_network(model_type, {**interface, **model_kwargs})

    def network(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        class_labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> Tensor:
        """The raw network F (B, C, H, W). t, s: one time, or one per image, of any shape. force_fp32: switch the
        caller's autocast off."""
        x, t, s = x.float(), t.float().reshape(-1, 1, 1, 1), s.float().reshape(-1, 1, 1, 1)
        c_in = torch.rsqrt(self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2) / self.sigma_data
        second = s if self.temb_type == "identity" else t - s
        optional = {} if augment_labels is None else {"augment_labels": augment_labels}
        with torch.autocast(x.device.type, enabled=False) if force_fp32 else nullcontext():
            return self.model(
                c_in * x,
                (t * self.time_scale).flatten(),
                (second * self.time_scale).flatten(),
                class_labels=self._one_hot(class_labels),
                **optional,
            )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        class_labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> Tensor:
        """x at time s <= t from x at time t.

        x: (B, C, H, W); t, s: a scalar or (B, 1, 1, 1). The result has at least the precision of their dtype.
        class_labels: one-hot (B, label_dim), a row of zeros for "no class"; None for no class at all.
        """
        F = self.network(x, t, s, class_labels, augment_labels=augment_labels, force_fp32=force_fp32)
        return self.output(x, F.to(t.dtype), t, s)

    def guided(self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None, cfg_scale: float) -> Tensor:
        """As forward, with classifier-free guidance of the network's output: F_0 + cfg_scale (F_class - F_0).

        t, s: one time for the whole batch. cfg_scale 1 is no guidance and costs one pass instead of two.
        """
        if cfg_scale == 1:
            return self(x, t, s, class_labels)
        if self.label_dim == 0 or class_labels is None:
            raise ValueError(
                f"guidance (cfg_scale = {cfg_scale}) needs a class-conditional network and class labels; use "
                "cfg_scale = 1"
            )
        if t.numel() != 1 or s.numel() != 1:
            raise ValueError(f"guidance takes one t and one s for the whole batch, got {t.numel()} and {s.numel()}")
        labels = class_labels.expand(len(x), -1)
        both = self.network(torch.cat([x, x]), t, s, torch.cat([torch.zeros_like(labels), labels]))
        F_none, F_class = both.to(t.dtype).chunk(2)
        return self.output(x, F_none + cfg_scale * (F_class - F_none), t, s)

    def output(self, x: Tensor, F: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The map from x at t and the network's output to x at s."""
        if self.f_type == "identity":
            return self.schedule.ddim(x, F, t, s)
        if self.f_type == "euler_fm":
            return x - (t - s) * self.sigma_data * F
        alpha_t, alpha_s, sigma_t, sigma_s = (
            part(time) for part in (self.schedule.alpha, self.schedule.sigma) for time in (t, s)
        )
        norm = alpha_t**2 + sigma_t**2
        c_skip = (alpha_t * alpha_s + sigma_t * sigma_s) / norm
        c_out = -(alpha_s * sigma_t - alpha_t * sigma_s) * torch.rsqrt(norm) * self.sigma_data
        return c_skip * x + c_out * F

    def _one_hot(self, class_labels: Tensor | None) -> Tensor | None:
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros(1, self.label_dim, device=next(self.parameters()).device)
        return class_labels.float().reshape(-1, self.label_dim)


def build_network(model_type: str, arguments: dict[str, object]) -> nn.Module:
    """A network by its name. Stored recipes mix the arguments of all networks: those of the others are left out."""
    _expect("model_type", model_type, (*NETWORKS, *PRESET_SIZES))
    arguments = {**PRESET_SIZES.get(model_type, {}), **arguments}
    accepted = {name: arguments_of(network) for name, network in NETWORKS.items()}
    unknown = set(arguments) - WITHOUT_EFFECT.union(*accepted.values())
    if unknown:
        raise ValueError(
            f"IMMPrecond: no IMM network has the argument(s) {', '.join(sorted(unknown))}; look for a misspelt name"
        )
    name = "DiT" if model_type in PRESET_SIZES else model_type
    return NETWORKS[name](**{key: value for key, value in arguments.items() if key in accepted[name]})


def arguments_of(network: type[nn.Module]) -> set[str]:
    """Names of the constructor's arguments, with those that it passes on to the network that it extends."""
    classes = network.__mro__[: network.__mro__.index(nn.Module)]
    return {name for cls in classes for name in inspect.signature(cls).parameters} - {"options"}


def _expect(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise ValueError(f"IMMPrecond: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
