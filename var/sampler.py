"""Sampling of VAR: one guided network call per scale; the keys and values of the coarser scales are kept.

Tian et al. 2024 (arXiv 2404.02905), section 3.1 and appendix; guidance as in their published script.
"""

# B batch, L tokens of one scale, V vocabulary, Z code width, S side of the token map

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.seeds import Rng
from var.options import Sampling
from var.quantizer import MultiScaleQuantizer
from var.transformer import Transformer


@dataclass(frozen=True)
class Scale:
    """What the sampler knows after one scale."""

    logits: Tensor  # (B, L, V) float32, guided and tempered, before top-k and top-p
    indices: Tensor  # (B, L) int64
    codes: Tensor  # (B, L, Z)
    f_hat: Tensor  # (B, Z, S, S) with this scale's contribution


@torch.no_grad()
def sample_scales(
    model: Transformer, quantizer: MultiScaleQuantizer, rng: Rng, labels: Tensor, how: Sampling
) -> Iterator[Scale]:
    """The scales of B images, coarse to fine.

    labels: (B,) int64 in 0 .. num_classes; num_classes means "no class". The network runs under the caller's autocast,
    the quantiser always in float32, because the sum over its scales is the image.
    """
    conditioning = model.conditioning(with_unconditional(labels, model.num_classes) if how.cfg_scale else labels)
    memory = model.sampling_memory(len(conditioning.start))
    f_hat = quantizer.empty(len(labels))
    tokens = model.first_tokens(conditioning)
    last = len(model.patch_nums) - 1
    for scale in range(last + 1):
        ratio = scale / last
        logits = model.next_logits(tokens, conditioning.blocks, conditioning.head, memory, scale)
        if how.cfg_scale:
            logits = guide(logits, how.cfg_scale * ratio)
        if how.temperature != 1:
            logits = logits / how.temperature
        likely = keep_likely(logits, top_k=how.top_k, top_p=how.top_p)
        indices = rng.categorical(likely.softmax(-1))
        with torch.autocast(labels.device.type, enabled=False):
            weights = gumbel_weights(likely, ratio, rng) if how.more_smooth else None
            codes = quantizer.embed(indices) if weights is None else weights @ quantizer.embedding.weight
            f_hat = quantizer.add_scale(f_hat, codes, scale)
            if scale < last:
                tokens = model.scale_tokens(quantizer.input_of_scale(f_hat, scale + 1), scale + 1)
                tokens = tokens.repeat(len(conditioning.start) // len(labels), 1, 1)
        yield Scale(logits, indices, codes, f_hat)


def with_unconditional(labels: Tensor, num_classes: int) -> Tensor:
    """(2B,): the labels, then as many "no class"."""
    return torch.cat((labels, torch.full_like(labels, num_classes)))


def guide(logits: Tensor, weight: float) -> Tensor:
    """(2B, L, V), conditional half first -> (1 + weight) conditional - weight unconditional, (B, L, V)."""
    conditional, unconditional = logits.chunk(2)
    return (1 + weight) * conditional - weight * unconditional


def keep_likely(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """-inf for every token outside the top k, then outside the top p of what is left; 0 switches either off.

    Ties with the k-th largest are kept; of ties at the border of the top p, those that torch.sort puts last. The
    likeliest token always survives.
    """
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        least = logits.kthvalue(vocabulary - top_k + 1, dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p == 0:
        return logits
    ascending, order = logits.sort(dim=-1)  # with the -inf of top_k in it, faster than a topk of the survivors
    is_tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    is_tail[..., -1] = False
    return logits.masked_fill(is_tail.scatter(-1, order, is_tail), -torch.inf)


def gumbel_weights(logits: Tensor, ratio: float, rng: Rng) -> Tensor:
    """Soft draws (B, L, V) that sum to 1: sharper at finer scales. ratio: scale / last scale."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return gumbel_softmax(logits * (1 + ratio), temperature, rng)


def gumbel_softmax(logits: Tensor, temperature: float, rng: Rng) -> Tensor:
    """softmax((logits + Gumbel noise) / temperature). Jang et al. 2017 (arXiv 1611.01144), equation 2."""
    gumbel = -rng.exponential(logits.shape[1:]).log()
    return ((logits + gumbel) / temperature).softmax(-1)
