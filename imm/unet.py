"""EDM's two U-Nets with a second time: everything that IMM changes in them is in this file.

The blocks, their order and the names are those of edm/unet.py. IMM adds a branch for s that joins the embedding before
the last silu (EDM applies that silu to the t branch alone), and its sinusoids are float64, so the whole mapping runs in
float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm import layers
from edm import unet as edm_unet
from edm.layers import FourierEmbedding, Linear


class PositionalEmbedding(layers.PositionalEmbedding):
    """EDM's sinusoids, computed and returned in float64: (B,) -> (B, channels)."""

    def forward(self, c: Tensor) -> Tensor:
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float64, device=c.device) / (half - int(self.endpoint))
        angles = c.double().outer((1 / 10000) ** exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class SongUNet(edm_unet.SongUNet):
    """DDPM++ or NCSN++ of (x, t, s). Further options are those of EDM's SongUNet; s_embed: whether the network sees
    s."""

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, s_embed: bool = True, **options: object
    ):
        initialise: Callable[..., None] = super().__init__  # the options come from a file
        initialise(img_resolution, in_channels, out_channels, **options)
        width, noise_width = self.map_layer0.weight.shape
        is_fourier = isinstance(self.map_noise, FourierEmbedding)
        if not is_fourier:
            self.map_noise = PositionalEmbedding(noise_width, endpoint=True)
        self.has_s = s_embed
        if s_embed:
            self.map_noise_s = (
                FourierEmbedding(noise_width) if is_fourier else PositionalEmbedding(noise_width, endpoint=True)
            )
            self.map_layer0_s = Linear(noise_width, width, init=edm_unet.SONG_INIT)
            self.map_layer1_s = Linear(width, width, init=edm_unet.SONG_INIT)
        register_last(self, "enc", "dec")

    def forward(  # type: ignore[override]  # a network of two times
        self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x: (B, in_channels, R, R); t, s: (B,) or (1,); labels as in EDM -> (B, out_channels, R, R)."""
        emb = self.embed(t, class_labels, augment_labels)
        if self.has_s:
            emb = emb + self.map_layer1_s(F.silu(self.map_layer0_s(swap_halves(self.map_noise_s(s)))))
        return self.blocks(x, F.silu(emb))


class DhariwalUNet(edm_unet.DhariwalUNet):
    """ADM of (x, t, s). Further options are those of EDM's DhariwalUNet; s_embed: whether the network sees s."""

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, s_embed: bool = True, **options: object
    ):
        initialise: Callable[..., None] = super().__init__  # the options come from a file
        initialise(img_resolution, in_channels, out_channels, **options)
        width, noise_width = self.map_layer0.weight.shape
        self.map_noise = PositionalEmbedding(noise_width, endpoint=False)
        self.has_s = s_embed
        if s_embed:
            self.map_layer0_s = Linear(noise_width, width, init=edm_unet.ADM_INIT)
            self.map_layer1_s = Linear(width, width, init=edm_unet.ADM_INIT)
        register_last(
            self, "map_augment", "map_layer0", "map_layer1", "map_label", "enc", "dec", "out_norm", "out_conv"
        )

    def forward(  # type: ignore[override]  # a network of two times
        self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x: (B, in_channels, R, R); t, s: (B,) or (1,); labels as in EDM -> (B, out_channels, R, R)."""
        emb = self.embed(t, class_labels, augment_labels)
        if self.has_s:
            emb = emb + self.map_layer1_s(F.silu(self.map_layer0_s(self.map_noise(s))))
        return self.blocks(x, F.silu(emb))


def swap_halves(emb: Tensor) -> Tensor:
    """[cos, sin] -> [sin, cos]."""
    return torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)


def register_last(module: nn.Module, *names: str) -> None:
    """Move children to the end: published files list the branch of s before them, and optimiser states depend on the
    order."""
    for name in names:
        if name in module._modules:
            module._modules[name] = module._modules.pop(name)
