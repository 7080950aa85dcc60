"""The models and experiments of toy_appendix.ipynb: Neon on a two-dimensional Gaussian, where every truth is known.

All replicas of an experiment (seeds, samplers) live in one stack of weights, dict[str, (R, ...)], and are computed together.
`neon.reverse_merge` works on a stack as it does on a state dict.
"""

from neon.toy.autoregressive import Autoregressive
from neon.toy.diffusion import Diffusion, ExactDiffusion
from neon.toy.experiment import (
    Curve,
    evaluation_noise,
    fine_tune,
    minima_table,
    plane,
    random_control,
    self_train,
    sweep,
    train_base,
)
from neon.toy.gradients import Alignment, alignment
from neon.toy.target import COVARIANCE, distance, real_points
from neon.toy.warmup import WarmUp

__all__ = [
    "COVARIANCE",
    "Alignment",
    "Autoregressive",
    "Curve",
    "Diffusion",
    "ExactDiffusion",
    "WarmUp",
    "alignment",
    "distance",
    "evaluation_noise",
    "fine_tune",
    "minima_table",
    "plane",
    "random_control",
    "real_points",
    "self_train",
    "sweep",
    "train_base",
]
