"""The networks, schedules, samplers, loss and file formats of IMM against vectors of the original code."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from imm.dit import DiT, position_table, sinusoid
from imm.family import IMM
from imm.loss import group_mmd, group_weight, imm_loss, kernel_weight, lognormal_nt, times, uniform_nt
from imm.options import Objective
from imm.precond import IMMPrecond
from imm.sampler import edm_grid, explicit_grid, pushforward, restart, uniform_grid
from imm.unet import PositionalEmbedding
from neon.checkpoints import checkpoint
from neon.images.formats import open_images
from neon.merge import reverse_merge
from neon.seeds import SharedRng
from tests import goldens

goldens.reference_only("imm", "*.npz", kind="eval_plan")


def seeded(arguments, arrays):
    """The golden's network: weights by name, buffers (random Fourier frequencies) from the file."""
    net = goldens.seed_by_name(IMMPrecond(**arguments)).eval()
    buffers = dict(net.named_buffers())
    for name, value in arrays.items():
        if name.startswith("buffer:"):
            buffers[name.removeprefix("buffer:")].copy_(goldens.tensor(value))
    return net


def assert_same(actual, expected, what):
    """rtol 1e-4 and 1e-5 of the expected spread, which is what the spec asks of float32 networks."""
    goldens.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(np.std(expected)) + 1e-12, what=what)


def first_outputs(net, names):
    """Record the first output of every named submodule of the network, as the files store them."""
    outputs = {}
    modules = dict(net.model.named_modules())

    def keep(name):
        def hook(module, inputs, output):  # returns nothing: what a hook returns takes the output's place
            outputs.setdefault(name, output.detach())

        return hook

    return outputs, [modules[name].register_forward_hook(keep(name)) for name in names]


def augment_every_call(net, labels):
    """Give the network the labels (B, 9), in each half of a guided batch: the original's files have them there, ours
    only in training."""

    def hook(module, inputs, options):
        return inputs, {**options, "augment_labels": labels.repeat(len(inputs[0]) // len(labels), 1)}

    net.model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="network"), ids=lambda f: f.stem)
@torch.no_grad()
def test_network(file):
    config, arrays = goldens.load(file)
    net = seeded(config["net"], arrays)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == config["keys"]
    assert list(net.state_dict()) == list(config["keys"])
    assert (net.nt_low, net.nt_high) == pytest.approx((config["nt_low"], config["nt_high"]), rel=1e-12)
    x, t, s = (goldens.tensor(arrays[name]) for name in ("x", "t", "s"))
    labels = goldens.tensor(arrays["class_labels"]) if "class_labels" in arrays else None
    augment = {"augment_labels": goldens.tensor(arrays["augment_labels"])} if "augment_labels" in arrays else {}
    middle = {name.removeprefix("mid:"): value for name, value in arrays.items() if name.startswith("mid:")}
    outputs, hooks = first_outputs(net, middle)
    F = net.network(x, t, s, labels, **augment)
    for hook in hooks:
        hook.remove()
    for name, value in middle.items():
        output = outputs[name] if outputs[name].numel() <= 4000 else outputs[name].flatten()[:1500]
        assert output.dtype == goldens.tensor(value).dtype, name
        assert_same(output, value, name)
    assert_same(F, arrays["F"], "F")
    t4, s4 = (time[:, None, None, None] for time in (t, s))
    assert_same(net(x.double(), t4, s4, labels, **augment), arrays["f_st"], "f_st")
    assert_same(net(x, t4.float(), s4.float(), labels, **augment), arrays["f_st32"], "f_st32")
    if augment:
        augment_every_call(net, augment["augment_labels"])
    t1, s1 = (goldens.tensor(arrays[name]) for name in ("t1", "s1"))
    assert_same(net(x.double(), t1, s1, labels), arrays["one_t"], "one_t")
    for name in arrays:
        if name.startswith("cfg_") and name != "cfg_f32":
            scale = 1.0 if name == "cfg_none" else float(name.removeprefix("cfg_"))
            assert_same(net.guided(x.double(), t1, s1, labels, scale), arrays[name], name)
    assert_same(net.guided(x, t1.float(), s1.float(), labels, 1.0), arrays["cfg_f32"], "cfg_f32")


@pytest.mark.slow
@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="real_size"), ids=lambda f: f.stem)
@torch.no_grad()
def test_real_size(file):
    config, arrays = goldens.load(file)
    net = seeded(config["net"], arrays)
    x, t, s = (goldens.tensor(arrays[name]) for name in ("x", "t", "s"))
    labels = None
    if config["class_index"] is not None:
        labels = nn.functional.one_hot(torch.tensor([config["class_index"]]), net.label_dim).float()
    assert_same(net(x.double(), t[:, :, None, None], s[:, :, None, None], labels), arrays["f_st"], "f_st")
    for name in arrays:
        if name.startswith("cfg_"):
            assert_same(
                net.guided(x.double(), t[0, 0], s[0, 0], labels, float(name.removeprefix("cfg_"))), arrays[name], name
            )


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="embeddings"), ids=lambda f: f.stem)
def test_embeddings(file):
    _, arrays = goldens.load(file)
    times = goldens.tensor(arrays.pop("tv"))
    for name, value in arrays.items():
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        if name.startswith("dit_positional_"):
            actual = sinusoid(times, numbers[0])
        elif name.startswith("unet_positional_"):
            actual = PositionalEmbedding(numbers[0], endpoint=name.endswith("endpoint"))(times)
        else:
            actual = position_table(numbers[0], numbers[1])
            actual = actual[numbers[2:]] if "_rows_" in name else actual
        assert actual.dtype == torch.float64, name
        goldens.assert_close(actual, value, atol=1e-9 if "positional" in name else 1e-12, what=name)


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="schedule"), ids=lambda f: f.stem)
def test_schedule(file):
    config, arrays = goldens.load(file)
    t, s, nt, y, noise = (goldens.tensor(arrays[name]) for name in ("t", "s", "nt", "y", "noise"))
    for prefix, meta in config["meta"].items():
        schedule_name, f_type, _ = prefix.split("/")
        net = tiny(
            noise_schedule=schedule_name, f_type=f_type, **{key: meta[key] for key in ("T", "eps", "sigma_data")}
        )
        schedule = net.schedule
        assert (net.nt_low, net.nt_high) == pytest.approx((meta["nt_low"], meta["nt_high"]), rel=1e-12)
        t4, s4 = t[:, None, None, None], s[:, None, None, None]
        x = schedule.add_noise(y, noise, t4)
        actual = {
            "logsnr": schedule.logsnr(t),
            "log_nt": schedule.log_nt(t),
            "logsnr_prime": schedule.logsnr_slope(t),
            "alpha": schedule.alpha(t),
            "sigma": schedule.sigma(t),
            "nt_to_t": schedule.t_of_nt(nt),
            "nt_to_t_inf": schedule.t_of_nt(torch.full((1,), torch.inf, dtype=torch.float64)),
            "add_noise": x,
            "ddim_noise": schedule.add_noise(y, noise, s4),
            "ddim": schedule.ddim(x, y, t4, s4),
        }
        for output_map in ("simple_edm", "euler_fm"):
            if f"{prefix}{output_map}_fn" in arrays:
                net.f_type = output_map
                actual[f"{output_map}_fn"] = net.output(x, noise, t4, s4)
        net.f_type = f_type
        for name in arrays:
            if weight := re.fullmatch(rf"{prefix}(w|wout)_a(.+)_b(.+)", name):
                a, b = float(weight[2]), float(weight[3])
                value = kernel_weight(net, t, s) if weight[1] == "w" else group_weight(schedule, t, a=a, b=b)
                actual[name.removeprefix(prefix)] = value
        shape = arrays[f"{prefix}eta_uniform_nt"].shape
        torch.manual_seed(config["manual_seed_eta"])
        uniform = uniform_nt(schedule, torch.rand(shape, dtype=torch.float64), 0.01, 50.0)
        torch.manual_seed(config["manual_seed_eta"])
        lognormal = lognormal_nt(torch.rand(shape), np.log(1e-3), np.log(50.0), P_mean=-1.1, P_std=2.0)
        for name, value in (("uniform", uniform), ("lognormal", lognormal)):
            actual |= {f"eta_{name}_nt": value, f"eta_{name}_lognt": value.log()}
        torch.manual_seed(config["manual_seed_init"])
        shape = arrays[f"{prefix}init_noise"].shape
        actual["init_noise"] = SharedRng(shape[0]).normal(shape[1:]) * net.sigma_data
        assert {prefix + name for name in actual} == {name for name in arrays if name.startswith(prefix)}
        for name, value in actual.items():
            goldens.assert_close(value, arrays[prefix + name], rtol=1e-12, atol=1e-12, what=prefix + name)


def tiny(**arguments):
    return IMMPrecond(
        img_resolution=4,
        img_channels=2,
        model_type="DiT",
        hidden_size=8,
        depth=1,
        num_heads=1,
        label_dim=1,
        num_classes=1,
        **arguments,
    )


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="sampler"), ids=lambda f: f.stem)
def test_sampler(file):
    config, arrays = goldens.load(file)
    net = seeded(config["net"], arrays)
    z = goldens.tensor(arrays["z"])
    torch.manual_seed(config["manual_seed_z"])
    torch.testing.assert_close(SharedRng(len(z)).normal(z.shape[1:]) * net.sigma_data, z, rtol=0, atol=0)
    labels = goldens.tensor(arrays["class_labels"]) if "class_labels" in arrays else None
    for case in config["cases"]:
        tag = case["tag"]
        dtype = {"f32": torch.float32, "f64": torch.float64}[case["precision"]]
        grid = grid_of(net, case, dtype)
        is_restart = case["fn"].startswith("restart")
        starts = grid[:-1]
        ends = torch.full_like(starts, net.eps) if is_restart else grid[1:]
        exact = 0.0 if dtype == torch.float32 else 1e-15
        goldens.assert_close(starts, arrays[f"{tag}/t"], atol=exact, what=f"{tag}/t")
        goldens.assert_close(ends, arrays[f"{tag}/s"], atol=exact, what=f"{tag}/s")
        cfg_scale = 1.0 if case["cfg_scale"] is None else case["cfg_scale"]
        states = record_states(net)
        torch.manual_seed(config["manual_seed_before_each_case"])
        if is_restart:
            x = restart(net, z, grid, labels, SharedRng(len(z)), cfg_scale=cfg_scale)
        else:
            x = pushforward(net, z, grid, labels, cfg_scale=cfg_scale)
        assert x.dtype == dtype
        # 2e-5 of the spread: guided outputs of tiny networks move by 1e-6 with the number of threads
        tolerance = 2e-5 * float(np.std(arrays[f"{tag}/x"]))
        goldens.assert_close(x, arrays[f"{tag}/x"], atol=tolerance, rtol=1e-5, what=f"{tag}/x")
        if f"{tag}/traj" in arrays:
            goldens.assert_close(
                torch.stack(states), arrays[f"{tag}/traj"], atol=tolerance, rtol=1e-5, what=f"{tag}/traj"
            )


def grid_of(net, case, dtype):
    if case.get("discretization") == "uniform":
        return uniform_grid(net, case["num_steps"], dtype)
    if case.get("discretization") == "edm":
        return edm_grid(net, case["num_steps"], dtype)
    return explicit_grid(net, case["mid_nt"] or (), dtype)


def record_states(net):
    """The state after every step of the next sampler call."""
    states = []
    guided = type(net).guided

    def recorded(*arguments):
        states.append(guided(net, *arguments))
        return states[-1]

    net.guided = recorded
    return states


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="loss"), ids=lambda f: f.stem)
def test_loss(file, monkeypatch):
    monkeypatch.setattr(nn.functional, "dropout", goldens.dropout)
    config, arrays = goldens.load(file)
    net = seeded(config["net"], arrays).train()
    how = objective(config["loss"])
    images, labels = goldens.tensor(arrays["images"]), goldens.tensor(arrays["labels"])
    labels = labels if net.label_dim else None
    torch.manual_seed(config["manual_seed_single"])
    draws = published_draws(images, how)
    t, r, s = times(net, draws["u_t"], draws["u_s"], how)
    for name, value in (("t", t), ("r", r), ("s", s)):
        goldens.assert_close(value[:: how.group_size], arrays[name].ravel(), rtol=1e-12, atol=1e-12, what=name)
    goldens.assert_close(draws["noise"] * net.sigma_data, arrays["noise"], atol=0, what="noise")
    assert np.array_equal((draws["u_drop"] < how.label_drop).numpy(), arrays["label_drop_mask"])

    loss = imm_loss(net, images, labels, **draws, how=how)
    groups = loss[:: how.group_size]
    assert torch.equal(loss, groups.repeat_interleave(how.group_size))
    goldens.assert_close(groups, arrays["loss"], rtol=1e-4, atol=1e-9, what="loss")
    loss.mean().backward()
    norms = {
        name: parameter.grad.norm().item() for name, parameter in net.named_parameters() if parameter.grad is not None
    }
    assert len(norms) == config["n_params_with_grad"]
    for name, norm in config["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=2e-3, abs=1e-7), name


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="loss"), ids=lambda f: f.stem)
def test_mmd_of_the_stored_samples(file):
    config, arrays = goldens.load(file)
    student, teacher = (goldens.tensor(arrays[name]).flatten(2) for name in ("f_st", "f_sr"))
    net = IMMPrecond(**config["net"])
    t, s = (goldens.tensor(arrays[name]).flatten() for name in ("t", "s"))
    weight = kernel_weight(net, t, s)
    front = group_weight(net.schedule, t, a=config["loss"]["a"], b=config["loss"]["b"])
    goldens.assert_close(weight, arrays["wt"], rtol=1e-12, atol=0, what="w")
    goldens.assert_close(front, arrays["wtout"], rtol=1e-12, atol=0, what="wout")
    mmd = front * group_mmd(student, teacher, weight / config["loss"]["sigma"])
    goldens.assert_close(mmd, arrays["loss"], rtol=1e-9, atol=1e-12, what="loss")


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="loss"), ids=lambda f: f.stem)
def test_training_steps(file, monkeypatch):
    monkeypatch.setattr(nn.functional, "dropout", goldens.dropout)
    config, arrays = goldens.load(file)
    net = seeded(config["net"], arrays).train()
    average = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    how = objective(config["loss"])
    images, labels = goldens.tensor(arrays["images"]), goldens.tensor(arrays["labels"])
    options = {"lr": config["lr"], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = getattr(torch.optim, config["optimizer"])(net.parameters(), **options)
    torch.manual_seed(config["manual_seed_train"])
    losses = []
    for _ in range(config["nsteps"]):
        loss = imm_loss(net, images, labels if net.label_dim else None, **published_draws(images, how), how=how).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for name, parameter in net.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - config["ema_beta"])
    goldens.assert_close(torch.stack(losses), arrays["train_losses"], rtol=1e-4, atol=1e-9, what="losses")
    assert [name for name, _ in net.named_parameters()] == config["param_order"]
    for kind, values in (("after", dict(net.named_parameters())), ("ema", average)):
        for name in (name for name in arrays if name.startswith(f"{kind}:")):
            actual = values[name.partition(":")[2]].detach().flatten()[:500]
            # Adam's first steps are sign-like: an entry without a gradient may go either way
            close = (actual - goldens.tensor(arrays[name])).abs() < 1e-5
            if name.endswith("attn.qkv.bias") and not config["net"].get("qk_norm"):
                queries, _, contents = close.chunk(
                    3
                )  # a bias of the keys shifts all scores of a query alike: no gradient at all
                close = torch.cat([queries, contents])
            assert close.float().mean() >= 0.99, name


def objective(loss):
    return Objective(
        group_size=loss["matrix_size"],
        bandwidth=loss["sigma"],
        a=loss["a"],
        b=loss["b"],
        k=loss["k"],
        label_drop=loss.get("label_dropout", 0.1),
        min_gap=loss.get("min_tr_gap") or 0.0,
        times="lognormal-published" if loss.get("sample_t_mode", "lognormal") == "lognormal" else "uniform",
        P_mean=loss.get("P_mean", -1.1),
        P_std=loss.get("P_std", 2.0),
    )


def published_draws(images, how):
    """The numbers of one step in the order in which the original draws them from one generator."""
    num_groups = len(images) // how.group_size
    dtype = torch.float64 if how.times == "uniform" else torch.float32
    u_t, u_s = (
        torch.rand([num_groups, 1, 1, 1], dtype=dtype).flatten().repeat_interleave(how.group_size) for _ in range(2)
    )
    u_drop = torch.rand([len(images)])
    return {"u_t": u_t, "u_s": u_s, "u_drop": u_drop, "noise": torch.randn_like(images)}


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="merge"), ids=lambda f: f.stem)
def test_merge(file):
    config, arrays = goldens.load(file)
    parameters = dict(IMMPrecond(**config["net"]).named_parameters())
    cases = {name.partition("_base:")[0] for name in arrays if "_base:" in name}
    assert cases
    for case in cases:
        parts = {
            part: {
                name.partition(":")[2]: goldens.tensor(value)
                for name, value in arrays.items()
                if name.startswith(f"{case}_{part}:")
            }
            for part in ("base", "aux", "merged")
        }
        merged = reverse_merge(
            parts["base"], parts["aux"], config["w"], parameters=set(parameters), on_mismatch="keep_base"
        )
        assert set(merged) == set(parts["merged"])
        for name, expected in parts["merged"].items():
            base, aux, actual = (values[name].double() for values in (parts["base"], parts["aux"], merged))
            assert merged[name].dtype == expected.dtype
            is_kept = ~(base.isfinite() & aux.isfinite())
            torch.testing.assert_close(actual[is_kept], base[is_kept], rtol=0, atol=0, equal_nan=True)
            # the original rounds the other model, the difference, the product and the sum to the base's dtype; we only
            # the sum
            sizes = config["w"] * (aux.abs() + 2 * (aux - base).abs()) + 2 * expected.double().abs()
            error = (actual - expected.double()).abs()
            assert (error <= sizes * torch.finfo(expected.dtype).eps / 2)[~is_kept].all(), f"{case} {name}"


def test_dit_names_the_wrong_resolution():
    with pytest.raises(ValueError, match="takes images of shape"):
        DiT(8, in_channels=4, hidden_size=8, depth=1, num_heads=1)(
            torch.zeros(1, 4, 16, 16), torch.ones(1), torch.ones(1), torch.zeros(1, 1000)
        )


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="dataset"), ids=lambda f: f.stem)
def test_latent_dataset(file):
    config, arrays = goldens.load(file)
    archive = file.with_name(config["file"])
    plain = open_images(archive).read(range(len(open_images(archive))))
    for case in config["cases"]:
        kwargs, tag = case["kwargs"], case["tag"]
        found = goldens.published_subset(open_images(archive, use_labels=kwargs.get("use_labels", True)), kwargs)
        assert (len(found), found.shape, found.num_classes) == (
            case["len"],
            (case["num_channels"], case["resolution"], case["resolution"]),
            case["label_dim"],
        )
        latents = found.read(range(len(found)))
        flip = goldens.tensor(arrays[f"{tag}/xflip"]).bool()[:, None, None, None]
        chosen = plain[goldens.tensor(arrays[f"{tag}/raw_idx"])]
        assert torch.equal(latents, torch.where(flip, chosen.flip(-1), chosen))
        assert torch.equal(latents[0], goldens.tensor(arrays[f"{tag}/first"]))
        assert torch.equal(latents[-1], goldens.tensor(arrays[f"{tag}/last"]))
        labels = (
            np.zeros((len(found), 0))
            if found.labels is None
            else nn.functional.one_hot(found.labels, found.num_classes).numpy()
        )
        assert np.array_equal(labels, arrays[f"{tag}/labels"])


@pytest.mark.parametrize("file", goldens.collect("imm", "*.zip"), ids=lambda f: f.stem)
def test_every_archive_is_described(file):
    described = [goldens.config_of(npz).get("file") for npz in goldens.files("imm") if npz.suffix == ".npz"]
    assert file.name in described


@pytest.mark.parametrize("file", goldens.collect("imm", "*.npz", kind="pkl"), ids=lambda f: f.stem)
def test_pickle_holds_the_expected_tensors(file):
    config, arrays = goldens.load(file)
    found = checkpoint.read(file.with_name(config["file"]), weights="ema")
    assert found.family == "imm"
    assert found.arch == {"class_name": config["class_name"], **config["init_kwargs"]}
    assert list(found.tensors) == list(config["keys"])
    for name, (*shape, dtype) in config["keys"].items():
        value = found.tensors[name]
        assert (list(value.shape), str(value.dtype)) == (shape, dtype)
        assert value.double().sum().item() == pytest.approx(float(arrays[f"sum:{name}"]), rel=1e-12, abs=1e-9)
        assert np.array_equal(value.flatten()[:8].numpy(), arrays[f"head:{name}"])
    model = IMM().load(found)
    assert all(torch.equal(value, found.tensors[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("file", goldens.collect("imm", "*.pkl"), ids=lambda f: f.stem)
def test_pickle_is_read_without_running_it(file):
    """The source text inside raises when it is run; a file whose name ends in _evil names foreign functions and is
    refused."""
    if file.stem.endswith("_evil"):
        with pytest.raises(ValueError, match=re.escape(file.name)):
            checkpoint.read(file)
    else:
        assert len(checkpoint.read(file).tensors) > 0
