"""Which noise goes with which image: optimal transport within a batch (Tong et al. 2024, arXiv 2302.00482, section
3.2).

B noises and B images in any number of dimensions; plans are (B0, B1) float64 with equal marginals.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def transport_cost(noise: Tensor, images: Tensor) -> Tensor:
    """Squared distances (B0, B1)."""
    return torch.cdist(noise.flatten(1), images.flatten(1)).square()


def assigned(cost: Tensor) -> Tensor:
    """(B,) the column of every row in the permutation of least cost. cost: square."""
    return torch.from_numpy(linear_sum_assignment(cost.double().numpy())[1])


def exact_plan(cost: Tensor) -> Tensor:
    """The transport of least cost between uniform weights.

    With every row and column repeated up to their least common multiple it is an assignment; of a square cost a
    permutation / B.
    """
    rows, columns = cost.shape
    size = math.lcm(rows, columns)
    row, column = torch.arange(size) // (size // rows), torch.arange(size) // (size // columns)
    plan = torch.zeros(rows, columns, dtype=torch.float64)
    pairs = (row, column[assigned(cost[row][:, column])])
    return plan.index_put_(pairs, torch.tensor(1 / size, dtype=torch.float64), accumulate=True)


def sinkhorn_plan(cost: Tensor, reg: float, *, tolerance: float = 1e-9, max_iterations: int = 10_000) -> Tensor:
    """The plan that minimises <plan, cost> - reg entropy(plan) (Cuturi 2013), to `tolerance` in the marginals' 2-norm.

    In logarithms, so that a small reg does not underflow. Raises ValueError if it does not converge.
    """
    scores = cost.double() / -reg
    marginals = [torch.full((size,), -math.log(size), dtype=torch.float64) for size in cost.shape]
    column = torch.zeros_like(marginals[1])
    for _ in range(max_iterations):
        row = marginals[0] - (scores + column).logsumexp(1)
        column = marginals[1] - (scores + row[:, None]).logsumexp(0)
        plan = (scores + row[:, None] + column).exp()
        if (plan.sum(1) - marginals[0].exp()).norm() < tolerance:
            return plan
    raise ValueError(
        f"sinkhorn did not converge in {max_iterations} iterations at reg {reg:g}: raise sigma, or use the exact plan"
    )


def sampled_pairs(plan: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (i, j) drawn from a plan with replacement, by inverting its cumulative distribution. uniform: (B,) float64
    on [0, 1)."""
    cumulative = (plan / plan.sum()).flatten().cumsum(0)
    drawn = torch.searchsorted(cumulative / cumulative[-1], uniform, right=True)
    return drawn // plan.shape[1], drawn % plan.shape[1]
