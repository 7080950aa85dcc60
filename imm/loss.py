"""The loss of IMM: what f makes at time s from time t must be distributed as what it makes at s from r, which lies
between them.

Zhou et al. 2025 (arXiv 2503.07565), eq. 12 and algorithm 1: a kernel MMD within groups of m images that share (t, r,
s). B batch, G = B / m groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imm.options import Objective
from imm.precond import IMMPrecond
from imm.schedule import Schedule


def uniform_nt(schedule: Schedule, u: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """nt whose time is uniform between those of nt = low and nt = high. u: uniform on [0, 1), any shape, float64."""
    t_low, t_high = (schedule.t_of_nt(torch.as_tensor(nt, dtype=torch.float64, device=u.device)) for nt in (low, high))
    return schedule.log_nt(u * (t_high - t_low) + t_low).exp()


def lognormal_nt(
    u: Tensor, log_low: Tensor | float, log_high: Tensor | float, *, P_mean: float, P_std: float
) -> Tensor:
    """nt whose logarithm is normal, truncated to [log_low, log_high]. u: uniform on [0, 1), any shape."""
    normal = torch.distributions.Normal(
        torch.tensor(P_mean, dtype=torch.float64, device=u.device),
        torch.tensor(P_std, dtype=torch.float64, device=u.device),
        validate_args=False,  # its checks wait for the device
    )
    low, high = (normal.cdf(torch.as_tensor(end, dtype=torch.float64, device=u.device)) for end in (log_low, log_high))
    return normal.icdf(u.double() * (high - low) + low).exp()


def times(net: IMMPrecond, u_t: Tensor, u_s: Tensor, how: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """t > r >= s of every group, float64, from uniform numbers of the same shape."""
    schedule, low, high = net.schedule, net.nt_low, net.nt_high
    if how.times == "uniform":
        nt = uniform_nt(schedule, u_t, low, high)
        ns = uniform_nt(schedule, u_s, low, nt)
    else:
        floor = max(low, 1e-8)
        t_floor = floor if how.times == "lognormal-published" else math.log(floor)  # the original forgot this logarithm
        nt = lognormal_nt(u_t, t_floor, math.log(high), P_mean=how.P_mean, P_std=how.P_std)
        ns = lognormal_nt(u_s, math.log(floor), nt.log(), P_mean=how.P_mean, P_std=how.P_std)
    ns = torch.minimum(ns, nt).clamp(min=low)
    nr = (nt - (high - low) * 2**-how.k).clamp(low, high)
    t, r, s = (schedule.t_of_nt(n) for n in (nt, nr, ns))
    if how.min_gap > 0:
        r = torch.minimum(r, (t - how.min_gap).clamp(min=net.eps))
    return t, torch.maximum(r, s).clamp(min=net.eps), s


def kernel_weight(net: IMMPrecond, t: Tensor, s: Tensor) -> Tensor:
    """w(s, t) of the kernel: 1 / (factor of the network's output in f). float64."""
    alpha_t, alpha_s, sigma_t, sigma_s = (
        part(time) for part in (net.schedule.alpha, net.schedule.sigma) for time in (t, s)
    )
    if net.f_type == "euler_fm":
        return 1 / (t - s).abs() / net.sigma_data
    angle = alpha_s * sigma_t - sigma_s * alpha_t
    if net.f_type == "identity":
        return (sigma_t / angle).abs()
    return (alpha_t**2 + sigma_t**2).sqrt() / angle.abs() / net.sigma_data


def group_weight(schedule: Schedule, t: Tensor, *, a: float, b: float) -> Tensor:
    """w(t) in front of a group's MMD; eq. 13. float64."""
    norm = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    return schedule.alpha(t) ** a / norm * 0.5 * -schedule.logsnr_slope(t) * torch.sigmoid(b - schedule.logsnr(t))


def mean_kernel(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean over all m x m pairs of exp(-weight |x_i - y_j| / D). x, y: (G, m, D) float64; weight: (G,); returns
    (G,)."""
    squared = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.transpose(1, 2)
    distance = squared.clamp(min=1e-8).sqrt()
    return torch.exp(-weight[:, None, None] * distance / x.shape[2]).mean((1, 2))


def group_mmd(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Squared MMD between the m samples of two sets, the diagonal included. (G, m, D), (G, m, D), (G,) -> (G,)."""
    with torch.no_grad():
        teacher_with_itself = mean_kernel(teacher, teacher, weight)
    return mean_kernel(student, student, weight) + teacher_with_itself - 2 * mean_kernel(student, teacher, weight)


def imm_loss(
    net: IMMPrecond,
    clean: Tensor,
    class_labels: Tensor | None,
    *,
    noise: Tensor,
    u_t: Tensor,
    u_s: Tensor,
    u_drop: Tensor,
    how: Objective,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """The loss of every image (B,) float64: its group's value, so the mean over images is the mean over groups.

    clean: (B, C, H, W); class_labels: one-hot (B, Y) or None; noise: unit normal like clean.
    u_t, u_s: (B,) float64 uniform on [0, 1), equal within a group; u_drop: (B,) uniform, an image below
    label_drop loses its class. The target is the current network itself, in float32; it keeps the classes that the
    student has lost (as published).
    """
    m = how.group_size
    if len(clean) % m:
        raise ValueError(f"the batch ({len(clean)} images here) must be a multiple of objective.group_size ({m})")
    t, r, s = (time[:, None, None, None] for time in times(net, u_t, u_s, how))
    noise = noise * net.sigma_data
    x_t, x_r = (net.schedule.add_noise(clean, noise, time) for time in (t, r))
    # the random state is restored after the teacher, so that both calls have the same dropout masks
    with torch.no_grad(), torch.random.fork_rng(devices=[clean.device] if clean.is_cuda else []):
        teacher = net(x_r, r, s, class_labels, augment_labels=augment_labels, force_fp32=True)
    student_labels = None if class_labels is None else class_labels * (u_drop >= how.label_drop)[:, None]
    student = net(x_t, t, s, student_labels, augment_labels=augment_labels)
    t_group, s_group = t[::m].flatten(), s[::m].flatten()
    students, teachers = (x.flatten(1).unflatten(0, (-1, m)) for x in (student, teacher))
    mmd = group_mmd(students, teachers, kernel_weight(net, t_group, s_group) / how.bandwidth)
    return (group_weight(net.schedule, t_group, a=how.a, b=how.b) * mmd).repeat_interleave(m)
