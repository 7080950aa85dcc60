"""The loss of VAR: cross-entropy of every token given the coarser scales."""

# B batch, L tokens, V vocabulary

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over an image's L tokens, (B,).

    logits: (B, L', V) of the first L' <= L tokens. The others count as zero, so that the weight of the coarse scales
    stays the same when finer scales are added during training. targets: (B, L) int64.
    """
    predicted = targets[:, : logits.shape[1]]
    loss = F.cross_entropy(logits.transpose(1, 2), predicted, label_smoothing=label_smoothing, reduction="none")
    return loss.sum(1) / targets.shape[1]
