"""The Stable Diffusion autoencoder and the encoders of IMM: uint8 images <-> the space in which IMM's network works.

Zhou et al. 2025 (arXiv 2503.07565) train on latents of `stabilityai/sd-vae-ft-ema`, shifted and scaled per channel; the
usual factor 0.18215 is not used. Published files carry the names of the diffusers library, older ones other attention
names:
`from_diffusers` accepts both.
"""

# B batch, C image channels, R image side, Z latent channels, r latent side

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from neon.networks.autoencoder import ConvLayout, KLAutoencoder, mean_and_std
from neon.quantize import from_uint8

SD_VAE = ConvLayout(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, has_moments=True)
"""Layout of stabilityai/sd-vae-ft-ema and sd-vae-ft-mse."""

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LEGACY_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def layout_from_diffusers(config: Mapping[str, object]) -> ConvLayout:
    """The layout of a diffusers `config.json` of an AutoencoderKL. Raises ValueError for block types that are not
    plain."""
    for key, plain in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = config.get(key, [])
        if not isinstance(kinds, Sequence) or set(kinds) - {plain}:
            raise ValueError(f"{key}: expected only {plain!r}, found {kinds!r}")
    widths = config.get("block_out_channels")
    if not isinstance(widths, Sequence) or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels: expected a list of multiples of its first entry, found {widths!r}")
    return ConvLayout(
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=_number(config, "layers_per_block"),
        z_channels=_number(config, "latent_channels"),
        image_channels=_number(config, "in_channels"),
        num_groups=_number(config, "norm_num_groups"),
        has_moments=True,
    )


def _number(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ValueError(f"{key}: expected a whole number, found {value!r}")
    return value


def from_diffusers(tensors: Mapping[str, Tensor], layout: ConvLayout) -> dict[str, Tensor]:
    """A published state dict under our names, for a strict load into KLAutoencoder(layout).

    Attention may have its current or its legacy names, and matrices (C, C) or 1x1 convolutions (C, C, 1, 1). Names that
    are not known are kept, so that the strict load reports them.
    """
    is_legacy = any(".attentions.0.query." in name for name in tensors)
    ours = {
        theirs: name for name, theirs in diffusers_names(layout, LEGACY_ATTENTION if is_legacy else ATTENTION).items()
    }
    renamed = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[:, :, None, None] if _is_attention(name) and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def to_diffusers(tensors: Mapping[str, Tensor], layout: ConvLayout) -> dict[str, Tensor]:
    """Our state dict as diffusers writes it: current names, its order, attention as matrices."""
    return {
        theirs: tensors[ours].flatten(1) if _is_attention(ours) and tensors[ours].ndim == 4 else tensors[ours]
        for ours, theirs in diffusers_names(layout).items()
    }


def _is_attention(name: str) -> bool:
    return ".attn_1." in name


def diffusers_names(layout: ConvLayout, attention: Mapping[str, str] = ATTENTION) -> dict[str, str]:
    """{our parameter name: its name in a diffusers file}, in the order of that file."""
    with torch.device("meta"):
        known = KLAutoencoder(layout).state_dict().keys()
    names = {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in _module_names(layout, attention)
        for kind in ("weight", "bias")
    }
    return {ours: theirs for ours, theirs in names.items() if ours in known}


def _module_names(layout: ConvLayout, attention: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs (ours, diffusers') of every module that any layout can have."""
    num_levels = len(layout.ch_mult)
    for side, levels, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield f"{side}.conv_in", f"{side}.conv_in"
        for position in range(num_levels):
            # diffusers counts the decoder's levels from the lowest resolution
            level = position if side == "encoder" else num_levels - 1 - position
            ours, theirs = f"{side}.{levels}.{level}", f"{side}.{levels}_blocks.{position}"
            for block in range(layout.num_res_blocks + 1):
                yield from _pairs(f"{ours}.block.{block}", f"{theirs}.resnets.{block}", RESNET)
            yield f"{ours}.{resample}.conv", f"{theirs}.{resample}rs.0.conv"
        yield from _pairs(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", attention)
        yield from _pairs(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", RESNET)
        yield from _pairs(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", RESNET)
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
    yield from _pairs("", "", {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"})


def _pairs(ours: str, theirs: str, names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return [(f"{ours}.{name}".lstrip("."), f"{theirs}.{there}".lstrip(".")) for name, there in names.items()]


class StabilityEncoder(nn.Module):
    """uint8 images <-> latents of IMM, by an SD autoencoder and one shift and scale per latent channel.

    raw_mean, raw_std: statistics of the autoencoder's latents (the defaults are those of the published ImageNet-256
    model); they are brought to mean `final_mean` and standard deviation `final_std`.
    """

    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        vae: KLAutoencoder,
        *,
        raw_mean: Sequence[float] = (0.86488, -0.27787343, 0.21616915, 0.3738409),
        raw_std: Sequence[float] = (4.85503674, 5.31922414, 3.93725398, 3.9870003),
        final_mean: float = 0.0,
        final_std: float = 0.5,
    ):
        super().__init__()
        if not len(raw_mean) == len(raw_std) == vae.layout.z_channels:
            raise ValueError(
                f"raw_mean and raw_std need one entry per latent channel ({vae.layout.z_channels}), got {raw_mean}, "
                f"{raw_std}"
            )
        self.vae = vae
        scale = torch.tensor(final_std) / torch.tensor(raw_std)
        bias = torch.tensor(final_mean) - torch.tensor(raw_mean) * scale
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("bias", bias[:, None, None], persistent=False)

    def encode_pixels(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, R, R) -> mean and standard deviation of the posterior, (B, 2 Z, r, r) float32.

        This is what IMM's latent datasets hold (not the log variance).
        """
        moments = self.vae.encode(from_uint8(images))
        return torch.cat(mean_and_std(moments), dim=1).float()

    def to_latents(self, mean_std: Tensor, noise: Tensor) -> Tensor:
        """Mean and standard deviation (B, 2 Z, r, r) and unit normal noise (B, Z, r, r) -> latents (B, Z, r, r)."""
        mean, std = mean_std.chunk(2, dim=1)
        return (mean + noise * std) * self.scale + self.bias

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z, r, r) -> images (B, C, R, R), about [-1, 1], not clipped, float32. Published rounding:
        "truncate"."""
        return self.vae.decode((latents - self.bias) / self.scale).float()


class PixelEncoder(nn.Module):
    """uint8 images <-> the pixel models' space, which is images in [-1, 1]. Published rounding: "edm"."""

    def to_latents(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, R, R) -> [-1, 1] float32."""
        return from_uint8(images)

    def decode(self, latents: Tensor) -> Tensor:
        """The network's images are images already."""
        return latents
