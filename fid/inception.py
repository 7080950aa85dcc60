"""The Inception-v3 of 2015-12-05 that FID is defined by, in the published key names.

It is not torchvision's: 1008 outputs, average pools that do not count the padding, and a max pool in the last block.
Weights: the TensorFlow graph, converted by torch-fidelity and pytorch-fid (the same file under two names).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fid.features import Extractor, Features, name_with_weights, to_rgb
from fid.resize import resize_tf1
from fid.weights import PublishedWeights, read_state_dict

NAME = "inception-2015-12-05"
WEIGHTS = PublishedWeights(
    files=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256_prefix="6726825d",
)


class InceptionV3(nn.Module):
    """uint8 RGB images (B, 3, H, W) of any size -> the taps that metrics use, each globally average-pooled.

    Returns {"64": (B, 64), "192": (B, 192), "768": (B, 768), "2048": (B, 2048), "logits_unbiased": (B, 1008)} in the
    dtype of the weights. "2048" is FID's feature; softmax of "logits_unbiased" (the last layer without its bias) is the
    Inception Score's distribution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool_channels=32)
        self.Mixed_5c = BlockA(256, pool_channels=64)
        self.Mixed_5d = BlockA(288, pool_channels=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, inner=128)
        self.Mixed_6c = BlockC(768, inner=160)
        self.Mixed_6d = BlockC(768, inner=160)
        self.Mixed_6e = BlockC(768, inner=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pool=average_pool)
        self.Mixed_7c = BlockE(2048, pool=max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = resize_tf1(images.to(self.fc.weight.dtype), 299, 299)
        x = (x - 128) / 128
        taps: dict[str, Tensor] = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # 147 x 147
        x = F.max_pool2d(x, 3, stride=2)
        taps["64"] = x.mean((2, 3))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # 71 x 71
        x = F.max_pool2d(x, 3, stride=2)
        taps["192"] = x.mean((2, 3))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # 35 x 35
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # 17 x 17
        taps["768"] = x.mean((2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # 8 x 8
        taps["2048"] = x.mean((2, 3))
        taps["logits_unbiased"] = F.linear(taps["2048"], self.fc.weight)
        return taps


class InceptionExtractor(Extractor):
    """FID's features (2048) and the Inception Score's logits (1008).

    is_folded: batch norms are moved into the convolutions of `network`, and on a CPU its memory order is channels_last:
        1.5 times as fast there, and about 1e-6 of the largest feature from the layers one by one, which are as far from
        float64 themselves. False: the layers one by one.
    """

    dim = 2048
    num_classes = 1008

    def __init__(
        self, network: InceptionV3, *, sha256: str, device: torch.device | str = "cpu", is_folded: bool = True
    ):
        super().__init__(device)
        self.network = network.eval().requires_grad_(False)
        if is_folded:
            for module in list(network.modules()):
                if isinstance(module, ConvNormReLU):
                    module.fold()
            if self.device.type == "cpu":  # measured there only
                network.to(memory_format=torch.channels_last)
        self.network.to(self.device)
        self.sha256 = sha256
        published = sha256.startswith(WEIGHTS.sha256_prefix)
        self.name = NAME if published else name_with_weights("inception", sha256, is_known=False)
        self.comparable = (
            None if published else f"the Inception weights (sha256 {sha256[:8]}...) are not the published ones"
        )

    def extract(self, images: Tensor) -> Features:
        taps = self.network(to_rgb(images))
        return Features(taps["2048"], taps["logits_unbiased"])


def open_inception(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    """The published network from `path` or the cache.

    Raises FileNotFoundError (saying what to put where) if the file is absent, ValueError if its hash or its keys
    differ.
    """
    file = path if path is not None else WEIGHTS.find()
    sha256 = WEIGHTS.check(file, allow_unknown=allow_unknown_weights)
    network = InceptionV3()
    read_state_dict(file, into=network)
    return InceptionExtractor(network, sha256=sha256, device=device)


def average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class ConvNormReLU(nn.Module):
    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Move the normalisation into the convolution, computed in float64 and rounded once. For evaluation only."""
        if isinstance(self.bn, nn.BatchNorm2d):  # else it is done
            dtype = self.conv.weight.dtype
            self.conv = fuse_conv_bn_eval(self.conv.double(), self.bn.double()).to(dtype)
            self.bn = nn.Identity()


class BlockA(nn.Module):
    """35 x 35."""

    def __init__(self, channels: int, *, pool_channels: int):
        super().__init__()
        self.branch1x1 = ConvNormReLU(channels, 64, 1)
        self.branch5x5_1 = ConvNormReLU(channels, 48, 1)
        self.branch5x5_2 = ConvNormReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNormReLU(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, padding=1)
        self.branch_pool = ConvNormReLU(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average_pool(x))], 1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = ConvNormReLU(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNormReLU(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17."""

    def __init__(self, channels: int, *, inner: int):
        super().__init__()
        self.branch1x1 = ConvNormReLU(channels, 192, 1)
        self.branch7x7_1 = ConvNormReLU(channels, inner, 1)
        self.branch7x7_2 = ConvNormReLU(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNormReLU(inner, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvNormReLU(channels, inner, 1)
        self.branch7x7dbl_2 = ConvNormReLU(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNormReLU(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNormReLU(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNormReLU(inner, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvNormReLU(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], 1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = ConvNormReLU(channels, 192, 1)
        self.branch3x3_2 = ConvNormReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNormReLU(channels, 192, 1)
        self.branch7x7x3_2 = ConvNormReLU(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNormReLU(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNormReLU(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8. The first of the two averages in its pooling branch, the second takes the maximum: as in the TensorFlow
    graph."""

    def __init__(self, channels: int, *, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.branch1x1 = ConvNormReLU(channels, 320, 1)
        self.branch3x3_1 = ConvNormReLU(channels, 384, 1)
        self.branch3x3_2a = ConvNormReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormReLU(channels, 448, 1)
        self.branch3x3dbl_2 = ConvNormReLU(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNormReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNormReLU(channels, 192, 1)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self._pool(x))]
        return torch.cat(parts, 1)
