"""The models and experiments of toy_appendix.ipynb: Neon on a two-dimensional Gaussian, where every truth is known.

All replicas of an experiment (seeds, samplers) live in one stack of weights, dict[str, (R, ...)], and are computed
together. `neon.reverse_merge` works on a stack as it does on a state dict.
"""
