"""The tokeniser of VAR: convolutional encoder and decoder around a multi-scale residual quantiser.

Tian et al. 2024 (arXiv 2404.02905), section 3.2. The state dict is that of `vae_ch160v4096z32.pth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from neon.networks.autoencoder import ConvArch, Decoder, Encoder
from var.quantizer import MultiScaleQuantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class VQVAEArch:
    """Constructor arguments of a VQVAE; the defaults are the published network's. See ConvArch for the first
    group."""

    patch_nums: tuple[int, ...]
    """Side of the token map of every scale; the last one is the latent's, image side / 2 ** (len(ch_mult) - 1)."""
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 32
    image_channels: int = 3
    num_groups: int = 32
    vocab_size: int = 4096
    using_znorm: bool = False
    """Nearest code by cosine instead of by distance."""
    quant_resi: float = 0.5
    """Weight of the convolution in phi; 0 leaves it out."""
    share_quant_resi: int = 4
    """Number of phi convolutions; 0: one per scale."""

    @property
    def conv(self) -> ConvArch:
        """Attention follows every block of the lowest resolution."""
        lowest = (len(self.ch_mult) - 1,)
        return ConvArch(
            ch=self.ch,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
            image_channels=self.image_channels,
            num_groups=self.num_groups,
            encoder_attention=lowest,
            decoder_attention=lowest,
            has_fused_qkv=True,
        )


class VQVAE(nn.Module):
    """Images (B, C, R, R) in [-1, 1] <-> features (B, Z, HW, HW) <-> token indices."""

    def __init__(self, arch: VQVAEArch):
        super().__init__()
        self.encoder = Encoder(arch.conv)
        self.decoder = Decoder(arch.conv)
        self.quantize = MultiScaleQuantizer(
            vocab_size=arch.vocab_size,
            z_channels=arch.z_channels,
            patch_nums=arch.patch_nums,
            is_cosine=arch.using_znorm,
            quant_resi=arch.quant_resi,
            share_quant_resi=arch.share_quant_resi,
        )
        self.quant_conv = nn.Conv2d(arch.z_channels, arch.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(arch.z_channels, arch.z_channels, 3, padding=1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, R, R) in [-1, 1] -> features (B, Z, HW, HW), not quantised."""
        return self.quant_conv(self.encoder(images))

    def decode_unclipped(self, f_hat: Tensor) -> Tensor:
        """Features (B, Z, HW, HW) -> images (B, C, R, R), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat))

    def decode(self, f_hat: Tensor) -> Tensor:
        """Features (B, Z, HW, HW) -> images (B, C, R, R), clipped to [-1, 1]."""
        return self.decode_unclipped(f_hat).clamp(-1, 1)

    def image_to_indices(self, images: Tensor, patch_nums: Sequence[int] | None = None) -> list[Tensor]:
        """Images in [-1, 1] -> the indices (B, l) of every scale. Call it in float32: indices are sensitive to
        rounding."""
        return self.quantize.indices_of(self.encode(images), patch_nums)

    def indices_to_image(self, indices: Sequence[Tensor]) -> Tensor:
        """The indices (B, l) of every scale -> images (B, C, R, R), clipped to [-1, 1]."""
        return self.decode(self.quantize.features_of(indices))
