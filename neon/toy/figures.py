"""The notebook's figures. Every function returns a matplotlib Figure that can be read without the code."""

# R replicas, N points

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from neon.toy.experiment import Curve, Model
from neon.toy.gradients import Alignment
from neon.toy.target import COVARIANCE, density, distance
from neon.toy.warmup import WarmUp

LIMIT = 5.5
DPI = 90
COLOURS = {"diversity-seeking": "tab:blue", "ordinary": "tab:green", "mode-seeking": "tab:orange"}


def densities(panels: Mapping[str, Tensor]) -> Figure:
    """The exact density, then a histogram of every panel's points (N, 2) with their Frechet distance to the truth;
    ellipses hold two standard deviations."""
    figure, axes = plt.subplots(
        1,
        1 + len(panels),
        dpi=DPI,
        figsize=(2.6 * (1 + len(panels)), 3.1),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    grid = torch.linspace(-LIMIT, LIMIT, 91)
    exact = density(torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1))
    brightest = 1.15 * exact.max().item()
    axes[0].pcolormesh(grid, grid, exact, shading="gouraud", cmap="Blues", vmin=0, vmax=brightest)
    axes[0].set_title("exact density\nFD 0", fontsize=10)
    for axis, (title, points) in zip(axes[1:], panels.items(), strict=True):
        x, y = points.double().T.numpy()
        axis.hist2d(x, y, bins=60, range=[[-LIMIT, LIMIT]] * 2, density=True, cmap="Blues", vmin=0, vmax=brightest)
        ellipse(axis, torch.cov(points.double().T), points.double().mean(0), colour="tab:red", line="--", label="model")
        fd = distance(points[None]).item()
        axis.set_title(f"{title}\nFD {fd:.2g}, N = {len(points):,}", fontsize=10)
    for axis in axes:
        ellipse(axis, COVARIANCE, torch.zeros(2), colour="black", line="-", label="truth")
        axis.set(aspect="equal", xlabel="x1", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))
    axes[0].set_ylabel("x2")
    axes[-1].legend(loc="lower right", fontsize=8, frameon=False)
    return figure


def ellipse(axis: Axes, covariance: Tensor, mean: Tensor, *, colour: str, line: str, label: str) -> None:
    """Two standard deviations around the mean."""
    angle = torch.linspace(0, 2 * torch.pi, 100, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    x, y = (2 * torch.linalg.cholesky(covariance) @ circle + mean.double()[:, None]).numpy()
    axis.plot(x, y, linewidth=1.3, color=colour, linestyle=line, label=label)


def curves(model: Model, by_budget: Mapping[int, Mapping[float, Curve]], control: Curve | None = None) -> Figure:
    """Distance against w: one panel per budget, one colour per sampler, thin lines the replicas, dashes the
    parabola."""
    figure, axes = plt.subplots(
        1,
        len(by_budget),
        dpi=DPI,
        figsize=(5.2 * len(by_budget), 4.3),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (budget, by_knob) in zip(axes[0], by_budget.items(), strict=True):
        for knob, curve in by_knob.items():
            kind = kind_of(model, knob)
            colour = COLOURS[kind]
            axis.plot(curve.ws, curve.values, color=colour, linewidth=0.5, alpha=0.5)
            axis.plot(
                curve.ws, curve.mean, color=colour, linewidth=2, label=f"S drawn with {model.knob} = {knob:g} ({kind})"
            )
            draw_parabola(axis, curve, colour)
        axis.axhline(curve.at(0), color="0.5", linewidth=0.8, linestyle=":", label="base (w = 0)")
        axis.axvline(0, color="0.5", linewidth=0.8, linestyle=":")
        axis.set(
            yscale="log",
            xlabel="w   (w > 0: away from the synthetic data)",
            title=f"{budget} steps of fine-tuning on S",
        )
    if control is not None:
        axes[0, 0].plot(
            control.ws, control.mean, color="0.4", linewidth=1.5, linestyle="-.", label="random direction, same length"
        )
    axes[0, 0].set_ylabel(distance_of(curve.num_points))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def distance_of(num_points: int) -> str:
    return f"Frechet distance to the truth, N = {num_points:,}"


def draw_parabola(axis: Axes, curve: Curve, colour: str) -> None:
    a, b, c = curve.parabola(curve.mean)
    vertex, step = -b / (2 * a), (curve.ws[1] - curve.ws[0]).item()
    w = np.linspace(vertex - 2 * step, vertex + 2 * step, 50)
    fitted = a * w**2 + b * w + c
    shown = fitted > curve.mean.min().item() / 2  # the axis is logarithmic
    axis.plot(w[shown], fitted[shown], color="black", linewidth=1, linestyle="--")
    axis.plot(vertex, np.interp(vertex, curve.ws, curve.mean), "v", color=colour, markeredgecolor="black")


def kind_of(model: Model, knob: float) -> str:
    """A higher zeta concentrates, a higher tau spreads."""
    if knob == model.ordinary:
        return "ordinary"
    return "mode-seeking" if (knob > 1) == (model.knob == "zeta") else "diversity-seeking"


def alignment(model: Model, result: Alignment) -> Figure:
    """Both cosines against the sampler's knob: mean and replicas."""
    figure, axes = plt.subplots(1, 2, dpi=DPI, figsize=(10.4, 3.5), sharey=True, layout="constrained")
    panels = {
        "with the gradient of the loss on real data": result.loss,
        "with the gradient of the Frechet distance": result.score,
    }
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.plot(result.knobs, values, color="tab:blue", linewidth=0.5, alpha=0.6)
        axis.plot(
            result.knobs, values.mean(1), "o-", color="tab:blue", markersize=4, label=f"mean of {values.shape[1]} seeds"
        )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(model.ordinary, color="tab:green", linestyle="--", linewidth=1, label="ordinary sampler")
        axis.axhspan(-1, 0, color="tab:orange", alpha=0.08)
        axis.annotate("aligned: w < 0 helps", (0.02, 0.94), xycoords="axes fraction", fontsize=8)
        axis.annotate("anti-aligned: w > 0 helps", (0.02, 0.03), xycoords="axes fraction", fontsize=8)
        sides = (
            "diversity-seeking  <   > mode-seeking" if model.knob == "zeta" else "mode-seeking  <   > diversity-seeking"
        )
        axis.set(title=title, xlabel=f"{model.knob} of the sampler that draws S\n({sides})", ylim=(-1, 1))
    axes[0].set_ylabel("cosine of the gradient on S")
    axes[0].legend(fontsize=8, loc="upper right" if model.knob == "zeta" else "lower right")
    return figure


def planes(panels: Mapping[str, tuple[Tensor, Tensor, Tensor]], *, num_points: int) -> Figure:
    """One map with contours per panel (w_s, w_o, `experiment.plane` of them, from so many points); base and the lowest
    points are marked."""
    figure, axes = plt.subplots(
        1, len(panels), dpi=DPI, figsize=(5.4 * len(panels), 4.4), layout="constrained", squeeze=False
    )
    for axis, (title, (ws, wo, values)) in zip(axes[0], panels.items(), strict=True):
        levels = np.geomspace(values.min().item(), values.max().item(), 12)
        filled = axis.contourf(ws, wo, values, levels=levels, norm=LogNorm(), cmap="viridis_r")
        axis.contour(ws, wo, values, levels=levels, colors="white", linewidths=0.4)
        figure.colorbar(filled, ax=axis, format="%.2g").set_label(distance_of(num_points), fontsize=8)
        row, column = divmod(int(values.argmin()), values.shape[1])
        synthetic, real = int(values[int(wo.abs().argmin())].argmin()), int(values[:, int(ws.abs().argmin())].argmin())
        for w_s, w_o, mark, text in (
            (0, 0, "o", "base"),
            (0, wo[real], "s", "best with new data alone"),
            (ws[synthetic], 0, "D", "best with synthetic data alone (Neon)"),
            (ws[column], wo[row], "*", "best with both"),
        ):
            axis.plot(
                w_s,
                w_o,
                mark,
                color="tab:red",
                markeredgecolor="white",
                markersize=14 if mark == "*" else 8,
                label=text,
            )
        axis.axhline(0, color="black", linewidth=0.5)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set(title=title, xlabel="w_s   (away from the synthetic data)", ylabel="w_o   (towards new real data)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def warm_up(problem: WarmUp, a: Tensor, excess: Tensor) -> Figure:
    """excess (A, F) of `WarmUp.excess_nll`: its mean against a, with the exact slope at 0."""
    figure, axis = plt.subplots(dpi=DPI, figsize=(6, 3.5), layout="constrained")
    mean = excess.mean(1)
    axis.fill_between(a, excess.quantile(0.1, 1), excess.quantile(0.9, 1), alpha=0.2, label="80 % of the data sets")
    axis.plot(a, mean, linewidth=2, label="mean over data sets")
    near = a[(mean[0] + problem.slope() * a) > mean.min()]
    axis.plot(near, mean[0] + problem.slope() * near, "k--", linewidth=1, label="exact slope at a = 0")
    axis.plot(a[mean.argmin()], mean.min(), "v", color="tab:blue", markeredgecolor="black", label="lowest")
    axis.axhline(mean[0].item(), color="0.5", linewidth=0.8, linestyle=":")
    axis.set(xlabel="a = w * learning rate * (1 - tau^2) / 2", ylabel="nats worse than the truth", ylim=(0, None))
    axis.legend(fontsize=8)
    return figure


def scatter_of_minima(curve: Curve) -> Figure:
    """Every replica's own curve and minimum: nothing systematic is left if the minima lie on both sides of 0."""
    figure, axis = plt.subplots(dpi=DPI, figsize=(6.4, 3.6), layout="constrained")
    axis.plot(curve.ws, curve.values, color="tab:blue", linewidth=0.6, alpha=0.6)
    axis.plot(curve.ws, curve.mean, color="tab:blue", linewidth=2, label="mean")
    lowest = curve.values.argmin(dim=0)
    axis.plot(
        curve.ws[lowest],
        curve.values.amin(dim=0),
        "v",
        color="tab:orange",
        markeredgecolor="black",
        label="minimum of one seed",
    )
    axis.axvline(0, color="0.5", linewidth=0.8, linestyle=":")
    axis.set(yscale="log", xlabel="w   (w > 0: away from the synthetic data)", ylabel=distance_of(curve.num_points))
    axis.legend(fontsize=8)
    return figure
