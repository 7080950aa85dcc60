"""The network, losses, samplers and training steps of TorchCFM against vectors of the original code."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
import sympy
import torch
from sympy.parsing.sympy_parser import (
    convert_xor,
    implicit_multiplication_application,
    parse_expr,
    standard_transformations,
)

from flow.coupling import assigned, exact_plan, sampled_pairs, sinkhorn_plan, transport_cost
from flow.family import Flow, to_pixels
from flow.loss import pairs, path
from flow.options import Objective
from flow.sampler import MIDPOINT, combined, dopri5, euler, interpolated, stages
from flow.unet import UNet, timestep_embedding
from neon.merge import reverse_merge
from neon.quantize import to_uint8
from neon.runtime.distributed import World
from neon.training.recipe import Training
from neon.training.schedules import lr_at
from neon.training.trainer import Trainer
from tests import goldens
from tests.goldens import assert_close, tensor

by_name = {"ids": lambda f: f.stem}
UNETS = goldens.collect("flow", "unet_*.npz")
REAL = goldens.collect("flow", "real_*.npz")
INITS = goldens.collect("flow", "init_*.npz")
EMBEDDINGS = goldens.collect("flow", "timestep_embedding*.npz")
EULER = goldens.collect("flow", "sampler_euler*.npz")
DOPRI5 = goldens.collect("flow", "sampler_dopri5_*.npz")
FIELDS = goldens.collect("flow", "dopri5_*.npz")
LOSSES = goldens.collect("flow", "loss_*.npz")
PLANS = goldens.collect("flow", "ot_plan*.npz")
GUIDED_PLANS = [
    file for file in PLANS if "guided_t" in np.load(file).files
]  # the original's guided path needs equal batches
TRAINS = goldens.collect("flow", "train_*.npz")
WARMUPS = goldens.collect("flow", "lr_warmup*.npz")
BYTES = goldens.collect("flow", "quantise*.npz")
MERGES = goldens.collect("flow", "neon_merge_*.npz")


def seeded(config):
    return goldens.seed_by_name(UNet(**config["model"])).eval().requires_grad_(False)


def check_network(file):
    config, arrays = goldens.load(file)
    net = seeded(config)
    assert sum(p.numel() for p in net.parameters()) == config["n_params"]
    outputs = {}
    for name in config["block_names"]:
        net.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.__setitem__(name, out)
        )
    net.time_embed.register_forward_pre_hook(lambda module, args: outputs.__setitem__("sinusoid", args[0]))
    t, x, y = (tensor(arrays[name]) if name in arrays else None for name in ("t", "x", "y"))
    out = net(t, x, y)
    for name, shape, row in zip(config["block_names"], config["block_shapes"], arrays["block_stats"], strict=True):
        block = outputs[name]
        assert list(block.shape) == shape
        actual = torch.stack([block.mean(), block.square().mean().sqrt(), block.flatten()[0], block.flatten()[-1]])
        assert_close(actual, row, atol=1e-5, rtol=1e-5, what=name)
    assert_close(outputs["sinusoid"], arrays["sinusoid"], atol=1e-6, what="sinusoid")
    for name, actual in (("time_embed", outputs["time_embed"]), ("middle_block", outputs["middle_block"][:1])):
        if name in arrays:
            assert_close(actual, arrays[name], atol=1e-5, what=name)
    assert_close(out, arrays["out"], atol=1e-5, what="out")


@pytest.mark.parametrize("file", UNETS, **by_name)
def test_unet(file):
    check_network(file)


@pytest.mark.parametrize("file", REAL, **by_name)
def test_real_size(file):
    check_network(file)


@pytest.mark.parametrize("file", INITS, **by_name)
def test_initial_weights(file):
    """The same draws in the same order: also the random stream ends where the original's did."""
    config, arrays = goldens.load(file)
    torch.manual_seed(config["seed"])
    net = UNet(**config["model"])
    assert np.array_equal(torch.rand(4).numpy(), arrays["next_rand"])
    assert [name for name, _ in net.named_parameters()] == config["names"]
    for (name, parameter), row in zip(net.named_parameters(), arrays["stats"], strict=True):
        value = parameter.detach().flatten()
        actual = [value.double().sum(), value.double().abs().sum(), value[0], value[-1]]
        assert_close(torch.stack([number.double() for number in actual]), row, atol=1e-9, rtol=1e-9, what=name)


@pytest.mark.parametrize("file", EMBEDDINGS, **by_name)
def test_timestep_embedding(file):
    _, arrays = goldens.load(file)
    t = tensor(arrays.pop("t"))
    rounding = 2**-23 * t[:, None].abs()  # a frequency's last bit, which differs between processors, times t
    for name, expected in arrays.items():
        found = timestep_embedding(t, int(name.removeprefix("d")))
        assert ((found - tensor(expected)).abs() <= 1e-6 + rounding).all(), name


def recorded(velocity, calls):
    """The velocity, whose times are noted."""

    def call(t, x, y=None):
        calls.append(float(t.flatten()[0]))
        return velocity(t, x, y)

    return call


@pytest.mark.parametrize("file", EULER, **by_name)
def test_euler(file):
    config, arrays = goldens.load(file)
    net, x, calls = seeded(config), tensor(arrays["x"]), []
    states = euler(recorded(net, calls), x, None, torch.linspace(0, 1, config["steps"] + 1))
    assert_close(torch.stack(states), arrays["traj"], atol=2e-5, what="traj")
    assert np.array_equal(np.float32(calls), arrays["t_eval"])
    assert len(calls) == config["nfe"]
    check_bytes(states[-1], arrays["uint8"])
    for name in ("euler100", "euler99"):
        num_steps, calls = int(name.removeprefix("euler")), []
        expected = arrays[name]
        final = euler(recorded(net, calls), x[: len(expected)], None, torch.linspace(0, 1, num_steps + 1))[-1]
        assert_close(final, expected, atol=2e-5, what=name)
        assert len(calls) == num_steps
        if num_steps == 100:
            assert np.array_equal(np.float32(calls), arrays["t_eval100"])


def check_bytes(x, expected):
    """Rounding may tip on a pixel whose value lies at a border between two levels."""
    difference = to_uint8(x, "edm").int() - tensor(expected).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.01


@pytest.mark.parametrize("file", DOPRI5, **by_name)
def test_dopri5(file):
    """As many calls, the same first step, nearly the same end. The networks are so smooth that their error estimates
    lie near float32's rounding: later steps differ from machine to machine, and the end by what the tolerance leaves
    open."""
    config, arrays = goldens.load(file)
    net, calls = seeded(config), []
    out = dopri5(recorded(net, calls), tensor(arrays["x"]), None, (0.0, 1.0), tol=config["tol"], error_norm="batch")[-1]
    assert len(calls) == config["nfe"] == 2 + 6 * (config["accepted"] + config["rejected"])
    assert_close(torch.tensor(calls[:8]), arrays["t_eval"][:8], atol=0, rtol=1e-4, what="t_eval")
    assert_close(out, arrays["out"], atol=max(1e-4, config["tol"]), what="out")


@pytest.mark.parametrize("file", DOPRI5, **by_name)
def test_dopri5_with_the_original_steps(file):
    """The arithmetic of a step and of its interpolant, at the times that the original chose."""
    config, arrays = goldens.load(file)
    net, calls, x = seeded(config), [], tensor(arrays["x"])
    velocity = recorded(net, calls)

    def field(t, y):
        return velocity(t.float().expand(len(x)), y.view(x.shape)).reshape(y.shape)

    y = x.reshape(1, -1)
    slope = field(torch.zeros(1, dtype=torch.float64), y)
    for t, h in goldens.tensor(arrays["accepted"]):
        slopes, y_new = stages(field, t[None], h[None], y, slope)
        last = ((1 - t[None]) / h, h[None], y, y_new, slopes[0], slopes[-1], combined(slopes, MIDPOINT, h[None]))
        y, slope = y_new, slopes[-1]
    if not config["rejected"]:
        assert_close(torch.tensor(calls), np.delete(arrays["t_eval"], 1), atol=1e-6, what="t_eval")
    out = interpolated(*last).view(x.shape)
    assert_close(out, arrays["out"], atol=2e-5, what="out")
    check_bytes(out, arrays["uint8"])


def field_of(formula):
    """The function of (t, x) that a text like "f = -x (3 + 2 sin 6t)" writes, products without a sign and functions
    without brackets."""
    readings = (*standard_transformations, implicit_multiplication_application, convert_xor)
    expression = parse_expr(formula.removeprefix("f = "), transformations=readings, evaluate=False)
    return sympy.lambdify(sympy.symbols("t x"), expression, modules=[torch])


def span_times(span, dtype):
    """[first, last], or "linspace(first,last,number)"."""
    if isinstance(span, str):
        first, last, number = re.fullmatch(r"linspace\((.+),(.+),(\d+)\)", span).groups()
        return torch.linspace(float(first), float(last), int(number), dtype=dtype)
    return torch.tensor(span, dtype=dtype)


@pytest.mark.parametrize("file", FIELDS, **by_name)
def test_dopri5_on_fields(file):
    config, arrays = goldens.load(file)
    slope = field_of(config["field"])
    for case, (nfe, accepted, rejected) in config["nfe_accepted_rejected"].items():
        dtype_name, span, tol = case.split("_")
        x = tensor(arrays["x"]).to(getattr(torch, dtype_name))
        times = span_times(config["spans"][span], x.dtype)
        sign = -1 if times[0] > times[-1] else 1  # backwards in t is forwards in -t with the negative field

        def field(t, x, labels=None, sign=sign):
            return sign * slope(sign * t[:, None], x)

        calls = []
        states = dopri5(recorded(field, calls), x, None, (sign * times).tolist(), tol=float(tol), error_norm="batch")
        assert nfe == 2 + 6 * (accepted + rejected)
        # in float32 the error estimate is near rounding: on other processors one step more or less is tried
        assert abs(len(calls) - nfe) in ((0, 6) if x.dtype == torch.float32 else (0,)), case
        expected = arrays[f"y_{case}"]
        atol = 1e-12
        if (
            x.dtype == torch.float32
        ):  # where a step jumps over a pole of the field, rounding alone moves the original by more
            rounding = np.abs(expected - arrays[f"y_float64_{span}_{tol}"]).max()
            atol = max(5e-4 if sign < 0 else 5e-5, float(rounding))
        assert_close(states, expected, atol=atol, what=case)


def objective(kind, sigma=0.0):
    return Objective(kind=kind, sigma=sigma, pairing="sampled")


def published_pairs(how, noise, images):
    """Drawn from numpy's global stream, as the original does."""
    if not how.is_paired:
        return noise, images
    i, j = pairs(how, noise, images, tensor(np.random.random_sample(len(noise))))
    return noise[i], images[j]


def published_path(how, noise, images, t=None):
    """The path after the original's draws: pairs, times, noise of the path whether it is needed or not."""
    noise, images = published_pairs(how, noise, images)
    t = torch.rand(len(images)) if t is None else t
    eps = torch.randn_like(noise)
    return t, eps, path(how, eps if how.kind == "fm" else noise, images, t, eps if how.has_path_noise else None)


@pytest.mark.parametrize("file", LOSSES, **by_name)
def test_loss(file):
    config, arrays = goldens.load(file)
    net, how = seeded(config), objective(config["matcher"], config["sigma"])
    x0, x1, given = (tensor(arrays[name]) for name in ("x0", "x1", "given_t"))
    torch.manual_seed(config["torch_seed"])
    np.random.seed(config["numpy_seed"])
    t, eps, (x_t, u_t) = published_path(how, x0, x1)
    assert np.array_equal(torch.rand(3).numpy(), arrays["after_torch"])
    assert np.array_equal(np.random.rand(3), arrays["after_numpy"])
    assert np.array_equal(t.numpy(), arrays["t"])
    assert np.array_equal(eps.numpy(), arrays["eps"])
    torch.manual_seed(config["given_t_torch_seed"])
    np.random.seed(config["given_t_numpy_seed"])
    _, _, (given_x_t, given_u_t) = published_path(how, x0, x1, given)
    for name, actual in (("xt", x_t), ("ut", u_t), ("given_t_xt", given_x_t), ("given_t_ut", given_u_t)):
        largest = max(
            1.0, float(np.abs(arrays[name]).max())
        )  # near an end of the path rounding grows with the velocity
        assert_close(actual, arrays[name], atol=1e-6 * largest, what=name)
    assert_close(net(t, x_t), arrays["vt"], atol=1e-5, what="vt")
    draws = {"t": t, "images": x1, "noise": eps if how.kind == "fm" else x0}
    if how.is_paired:
        np.random.seed(config["numpy_seed"])
        draws["noise"], draws["images"] = published_pairs(how, x0, x1)
    if how.has_path_noise:
        draws["path_noise"] = eps
    loss = Flow().loss(net, x1, None, draws, how).mean()
    assert_close(loss, torch.tensor(float(arrays["loss"])), atol=0, rtol=1e-5, what="loss")


@pytest.mark.parametrize("file", PLANS, **by_name)
def test_transport(file):
    config, arrays = goldens.load(file)
    x0, x1 = tensor(arrays["x0"]), tensor(arrays["x1"])
    cost = transport_cost(x0, x1)
    assert_close(cost, arrays["cost"], atol=1e-3, rtol=1e-5, what="cost")
    plan = exact_plan(cost)
    assert_close(plan, arrays["plan"], atol=1e-12, what="plan")
    assert_close(sinkhorn_plan(cost, config["sinkhorn_reg"]), arrays["sinkhorn_plan"], atol=1e-8, what="sinkhorn_plan")
    np.random.seed(config["numpy_seed_sample_map"])
    i, j = sampled_pairs(plan, tensor(np.random.random_sample(len(x0))))
    assert np.array_equal(np.random.rand(len(arrays["next_numpy"])), arrays["next_numpy"])
    assert np.array_equal(i.numpy(), arrays["i"])
    assert np.array_equal(j.numpy(), arrays["j"])
    assert np.array_equal(x0[i].numpy(), arrays["x0_sampled"])
    assert np.array_equal(x1[j].numpy(), arrays["x1_sampled"])
    possible = {tuple(pair) for pair in plan.nonzero().tolist()}
    without_replacement = list(zip(arrays["i_norep"].tolist(), arrays["j_norep"].tolist(), strict=True))
    assert len(set(without_replacement)) == min(len(x0), len(x1))
    assert set(without_replacement) <= possible
    if len(x0) == len(x1):  # the scipy variant of the original keeps the noise's order, ours the images'
        assert np.array_equal(x1[assigned(cost)].flatten(1).numpy(), arrays["scipy_x1"])
        assert np.array_equal(x0.flatten(1).numpy(), arrays["scipy_x0"])
        i, j = pairs(Objective(kind="otcfm"), x0, x1, None)
        assert set(zip(i.tolist(), j.tolist(), strict=True)) == possible


@pytest.mark.parametrize("file", GUIDED_PLANS, **by_name)
def test_labels_follow_their_images(file):
    config, arrays = goldens.load(file)
    x0, x1 = tensor(arrays["x0"]), tensor(arrays["x1"])
    np.random.seed(config["numpy_seed_guided"])
    torch.manual_seed(config["torch_seed_guided"])
    i, j = pairs(objective("otcfm"), x0, x1, tensor(np.random.random_sample(len(x0))))
    t = torch.rand(len(x0))
    x_t, u_t = path(objective("otcfm"), x0[i], x1[j], t, None)
    for name, actual in (("t", t), ("xt", x_t), ("ut", u_t), ("y0", i), ("y1", 100 + j)):
        assert_close(actual, arrays[f"guided_{name}"], atol=1e-6, what=name)


@pytest.mark.parametrize("file", TRAINS, **by_name)
def test_training_steps(file):
    config, arrays = goldens.load(file)
    if config["model"]["dropout"]:
        goldens.skip_where_draws_are_mkls()
    net = goldens.seed_by_name(UNet(**config["model"])).train()
    assert [name for name, _ in net.named_parameters()] == config["names"]
    how = objective(config["matcher"], config.get("sigma", 0.0))
    recipe = Training(
        images=10**9,
        batch=config["batch"],
        lr=config["lr"],
        lr_ramp_images=config.get("warmup", 5000) * config["batch"],
        ema_decay=config.get("decay", 0.9999),
        max_grad_norm=config["grad_clip"],
        objective=how,
    )
    trainer = Trainer(Flow(), net, recipe, World())
    kept = np.array(
        [not name.endswith(".qkv.bias") and name not in config["near_zero_gradient"] for name in config["names"]]
    )
    start = [parameter.detach().clone() for parameter in net.parameters()]
    torch.manual_seed(config["torch_seed"])
    np.random.seed(config["numpy_seed"])
    for step, images in enumerate(tensor(arrays["data"])):
        assert lr_at(recipe, trainer.images_seen) == pytest.approx(arrays["lr_used"][step], rel=1e-12)
        noise = torch.randn_like(images)
        draws = dict(zip(("noise", "images"), published_pairs(how, noise, images), strict=True))
        draws["t"], eps = torch.rand(len(images)), torch.randn_like(images)
        draws |= {"noise": eps} if how.kind == "fm" else {"path_noise": eps} if how.has_path_noise else {}
        assert np.array_equal(draws["t"].numpy(), arrays["t"][step])
        loss = trainer.backward(images, None, draws, recipe.batch)
        norms = torch.stack([parameter.grad.double().norm() for parameter in net.parameters()])
        assert_close(norms, arrays["grad_l2"][step], atol=1e-6, rtol=1e-4, what=f"gradients of step {step}")
        trainer.update(loss)
        moves = [
            (parameter.detach() - value).abs().double().mean()
            for parameter, value in zip(net.parameters(), start, strict=True)
        ]
        expected = arrays["mean_abs_move"][step][kept]
        assert_close(torch.stack(moves)[kept], expected, atol=1e-9, rtol=2e-2, what=f"moves until step {step}")
        assert [loss, trainer.last_grad_norm] == pytest.approx(
            [arrays["loss"][step], arrays["grad_norm"][step]], rel=1e-4
        )
    check_trained(arrays, net.eval(), trainer.ema, kept)


def check_trained(arrays, net, ema, kept):
    """Not the biases of keys: they have no gradient, so that Adam moves them by +-lr on rounding noise, which changes
    no output."""
    ours = {"net": {name: parameter.detach() for name, parameter in net.named_parameters()}, "ema": ema}
    for key in arrays:
        kind, slash, name = key.partition("/")
        if slash:
            assert_close(ours[kind][name], arrays[key], atol=2e-6, what=key)
    x, t = tensor(arrays["probe_x"]), tensor(arrays["probe_t"])
    with torch.no_grad():
        for kind, values in ours.items():
            stats = torch.stack([torch.stack([v.double().sum(), v.double().norm()]) for v in values.values()])
            assert_close(stats[kept], arrays[f"{kind}_stats"][kept], atol=2e-4, rtol=1e-5, what=kind)
            assert_close(
                torch.func.functional_call(net, values, (t, x)),
                arrays[f"probe_{kind}"],
                atol=2e-5,
                what=f"probe of {kind}",
            )


@pytest.mark.parametrize("file", WARMUPS, **by_name)
def test_warmup(file):
    config, arrays = goldens.load(file)
    batch = 128
    for name in (name for name in arrays if name.startswith("lr_")):
        warmup = int(name.removeprefix("lr_"))
        recipe = Training(images=10**9, batch=batch, lr=config["lr"], lr_ramp_images=warmup * batch)
        updates = arrays.get(f"index_{warmup}", np.arange(len(arrays[name])))
        assert [lr_at(recipe, int(k) * batch) for k in updates] == pytest.approx(arrays[name].tolist(), rel=1e-12)


@pytest.mark.parametrize("file", BYTES, **by_name)
def test_bytes(file):
    """Previews are rounded by another rule than evaluated images; the normalisation is undone exactly."""
    _, arrays = goldens.load(file)
    x, codes = tensor(arrays["x"]), tensor(arrays["bytes"])
    assert np.array_equal(to_uint8(x, "edm").numpy(), arrays["uint8"])
    assert (to_uint8(x, "round").int() - tensor(arrays["preview_uint8"]).int()).abs().max() <= 1
    pixels = to_pixels(codes, None)
    assert np.array_equal(pixels.numpy(), arrays["normalised"])
    assert np.array_equal(to_uint8(pixels, "edm").numpy(), arrays["round_trip"])
    assert torch.equal(to_uint8(pixels, "edm"), codes)


@pytest.mark.parametrize("file", MERGES, **by_name)
@torch.no_grad()
def test_merge(file):
    config, arrays = goldens.load(file)
    net, x, t = seeded(config), tensor(arrays["x"]), tensor(arrays["t"])
    base = net.state_dict()
    tuned = {}
    for name, value in base.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}#aux".encode()))
        tuned[name] = value + 0.01 * torch.randn(value.shape, generator=generator)
    merged = reverse_merge(base, tuned, config["w"], parameters=set(base))
    assert_close(merged["out.2.bias"], arrays["out2bias"], atol=1e-6, what="out.2.bias")
    for name, weights in (("base", base), ("tuned", tuned), ("merged", merged)):
        assert_close(torch.func.functional_call(net, weights, (t, x)), arrays[name], atol=1e-5, what=name)
