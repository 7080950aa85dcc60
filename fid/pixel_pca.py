"""The 64 leading principal components of pixels: features without any network, as a second opinion on the demo."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fid.features import Extractor, Features, name_with_weights
from fid.files import sha256_of
from fid.weights import read_safetensors

BASIS = Path(__file__).parent / "data" / "fashion_pca64.safetensors"


def principal_components(images: Tensor, dim: int) -> dict[str, Tensor]:
    """{"mean": (C*H*W,), "basis": (C*H*W, dim)} of uint8 images (N, C, H, W): pixels in [0, 1], orthonormal columns by
    falling variance, each signed so that its largest entry is positive."""
    pixels = images.flatten(1).double() / 255
    mean = pixels.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(pixels.T))
    basis = vectors.flip(1)[:, :dim]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return {"mean": mean.float(), "basis": (basis * largest.sign()).float().contiguous()}


class PixelPCA(Extractor):
    """Coordinates of the pixels along fixed principal components."""

    comparable = (
        "the features are principal components of pixels, not of the 2015-12-05 Inception that FID is defined by"
    )

    def __init__(self, name: str, *, mean: Tensor, basis: Tensor, sha256: str, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.name = name
        self.dim = basis.shape[1]
        self.sha256 = sha256
        self._mean, self._basis = mean.to(self.device), basis.to(self.device)

    def extract(self, images: Tensor) -> Features:
        if images.shape[1:] == (1, 32, 32) and len(self._mean) == 28 * 28:
            images = images[..., 2:-2, 2:-2]  # framed for an autoencoder, as fashion-cnn takes them
        pixels = images.flatten(1).float() / 255
        if pixels.shape[1] != len(self._mean):
            raise ValueError(
                f"{self.name} was made for images of {len(self._mean)} pixels, got shape {tuple(images.shape)}; for "
                "other sizes: efficientnet-lite0 or one of your own, module:attribute (docs/evaluator.md)"
            )
        return Features((pixels - self._mean) @ self._basis, None)


def open_pixel_pca64(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    """The shipped basis of the 10,000 Fashion-MNIST reference images; another one only with `allow_unknown_weights`."""
    file = path if path is not None else BASIS
    sha256 = sha256_of(file)
    if sha256 != sha256_of(BASIS) and not allow_unknown_weights:
        raise ValueError(f"{file}: not the shipped basis {BASIS}; pass --allow-unknown-weights to use it")
    tensors = read_safetensors(file)
    if set(tensors) != {"mean", "basis"}:
        raise ValueError(f"{file}: expected the tensors mean and basis, found {', '.join(sorted(tensors)) or 'none'}")
    name = name_with_weights("pixel-pca64", sha256, is_known=sha256 == sha256_of(BASIS))
    return PixelPCA(name, mean=tensors["mean"], basis=tensors["basis"], sha256=sha256, device=device)
