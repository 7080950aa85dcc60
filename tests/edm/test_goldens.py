"""The networks, samplers, losses and files of EDM against outputs of the original code."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

from edm import augment
from edm.family import EDM, FAMILY
from edm.guidance import NegativeGuidance
from edm.options import Objective, Sampling
from neon.checkpoints import checkpoint
from neon.images.formats import open_images
from neon.merge import reverse_merge
from neon.quantize import to_uint8
from neon.runtime.distributed import World
from neon.seeds import ImageRng, SharedRng
from neon.training.recipe import Training
from neon.training.schedules import ema_beta, lr_at
from neon.training.trainer import Trainer
from tests import goldens
from tests.goldens import assert_close, tensor

by_name = {"ids": lambda file: file.stem}

UNETS = goldens.collect("edm", "unet_*.npz")
PRECONDITIONERS = goldens.collect("edm", "precond_*.npz")
REAL = goldens.collect("edm", "real_*.npz")
INITS = goldens.collect("edm", "init_*.npz")
SCHEDULES = goldens.collect("edm", "schedules*.npz")
SAMPLERS = goldens.collect("edm", "sampler_[!g]*.npz")
GUIDED = goldens.collect("edm", "sampler_guided*.npz")
GENERATORS = goldens.collect("edm", "stacked_generator*.npz")
AUGMENTS = goldens.collect("edm", "augment_*.npz")
LOSSES = goldens.collect("edm", "loss_*.npz")
TRAIN_STEPS = goldens.collect("edm", "train_steps*.npz")
TRAIN_SCHEDULES = goldens.collect("edm", "train_schedules*.npz")
DATASETS = goldens.collect("edm", "dataset_*_expected.npz")
goldens.collect("edm", "dataset_*.zip", "edm_tiny*.pkl")  # read by the tests of their *_expected.npz
MERGES = goldens.collect("edm", "merge_state_dict*.npz")
PICKLES = goldens.collect("edm", "edm_tiny*_expected.npz")
goldens.reference_only(
    "edm", "infinite_sampler*"
)  # a windowed shuffle; training/loop.py draws epochs without replacement


class PublishedStream(SharedRng):
    """torch's global generator as the original code uses it: pairs of numbers per image are drawn as (2, B)."""

    def normal(self, shape, dtype=torch.float32):
        return torch.randn(2, self.batch, dtype=dtype).T if tuple(shape) == (2,) else super().normal(shape, dtype)

    def uniform(self, shape, dtype=torch.float32):
        return torch.rand(2, self.batch, dtype=dtype).T if tuple(shape) == (2,) else super().uniform(shape, dtype)


def build(config, arrays):
    """The name-seeded network of a golden, with its random buffers."""
    net = EDM().build({"class_name": config["precond"], **config["init_kwargs"]})
    goldens.seed_by_name(net)
    for name, array in arrays.items():
        if name.startswith("buffer/"):
            net.get_buffer(name.removeprefix("buffer/")).copy_(tensor(array))
    return net.eval()


def optional(arrays, name):
    return tensor(arrays[name]) if name in arrays else None


def record_outputs(net, blocks):
    """Outputs of the encoder and decoder entries, filled when the network runs."""
    outputs = {}
    for name in blocks:
        net.model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.__setitem__(name, out)
        )
    return outputs


@pytest.mark.parametrize("file", UNETS, **by_name)
@torch.no_grad()
def test_unet(file):
    config, arrays = goldens.load(file)
    net = build(config, arrays)
    assert sum(p.numel() for p in net.parameters()) == config["n_params"]
    outputs = record_outputs(net, config["blocks"])
    call = {name: optional(arrays, name) for name in ("x", "noise_labels", "class_labels")}
    out = net.model(**call, augment_labels=optional(arrays, "augment_labels"))
    for name, (mean, std, *head, shape) in config["blocks"].items():
        block = outputs[name]
        assert list(block.shape) == shape
        actual = torch.stack([block.mean(), block.std(), *block.flatten()[: len(head)]])
        assert_close(actual, torch.tensor([mean, std, *head]), atol=2e-5, rtol=1e-4, what=name)
    emb = torch.nn.functional.silu(
        net.model.embed(call["noise_labels"], call["class_labels"], optional(arrays, "augment_labels"))
    )
    assert_close(emb, arrays["emb"], atol=2e-5, rtol=1e-4)
    assert_close(out, arrays["out"], atol=2e-5, rtol=1e-4)
    if "out_no_augment_labels" in arrays:
        assert_close(net.model(**call), arrays["out_no_augment_labels"], atol=2e-5, rtol=1e-4)


def assert_denoised(actual, expected, what=""):
    """Error at most 2e-5 of the reference's standard deviation where that is above 1: c_out grows with sigma."""
    assert_close(actual, expected, atol=2e-5 * max(1.0, float(tensor(expected).std())), what=what)


@pytest.mark.parametrize("file", PRECONDITIONERS, **by_name)
@torch.no_grad()
def test_preconditioner(file):
    config, arrays = goldens.load(file)
    net = build(config, arrays)
    # iDDPM's levels begin with float32 sines, which MKL rounds in its own way on each kind of processor
    is_table = "u" in arrays
    limits = [float(config["sigma_min"]), float(config["sigma_max"])]
    assert [net.sigma_min, net.sigma_max] == (pytest.approx(limits, rel=1e-6) if is_table else limits)
    x, labels = tensor(arrays["x"]), optional(arrays, "class_labels")
    sigmas = tensor(arrays["sigmas"])
    for sigma, expected in zip(sigmas, arrays["out"], strict=True):
        assert_denoised(net((x * sigma).float(), sigma, labels), expected, f"sigma {sigma}")
    per_sample = tensor(arrays["sigma_per_sample"])
    assert_denoised(net(x * per_sample.reshape(-1, 1, 1, 1), per_sample, labels), arrays["out_per_sample"])
    x2 = (x * sigmas[2]).float()
    if "out_labels_none_sigma2" in arrays:
        assert_denoised(net(x2, sigmas[2], None), arrays["out_labels_none_sigma2"])
    if "out_augment_sigma2" in arrays:
        assert_denoised(
            net(x2, sigmas[2], labels, augment_labels=tensor(arrays["augment_labels"])), arrays["out_augment_sigma2"]
        )
    rounded = net.round_sigma(tensor(arrays["round_sigma_in"]))
    assert rounded.dtype == torch.float64
    assert_close(rounded, arrays["round_sigma_out"], atol=0, rtol=1e-6 if is_table else 0)
    if is_table:
        assert_close(net.u, arrays["u"], atol=0, rtol=1e-6)
        assert torch.equal(net.nearest_level(tensor(arrays["round_sigma_in"])), tensor(arrays["round_index"]))


@pytest.mark.parametrize("file", REAL, **by_name)
@torch.no_grad()
def test_real_size(file):
    config, arrays = goldens.load(file)
    net = build(config, arrays)
    x = tensor(arrays["x"])
    labels = None
    if "class_index" in arrays:
        labels = torch.nn.functional.one_hot(tensor(arrays["class_index"]), net.label_dim).float()
    for sigma, expected in zip(tensor(arrays["sigmas"]), arrays["out"], strict=True):
        assert_denoised(net((x * sigma).float(), sigma, labels), expected, f"sigma {sigma}")


@pytest.mark.parametrize("file", INITS, **by_name)
def test_initialisation(file):
    config, arrays = goldens.load(file)
    torch.manual_seed(config["seed"])
    state = EDM().build({"class_name": config["precond"], **config["init_kwargs"]}).state_dict()
    assert list(state) == config["names"]
    for (name, value), row in zip(state.items(), arrays["table"], strict=True):
        head = torch.zeros(len(row) - 2, dtype=torch.float64)
        head[: min(value.numel(), len(head))] = value.flatten()[: len(head)].double()
        actual = torch.cat([torch.stack([value.double().mean(), value.double().std(correction=0)]), head])
        assert_close(actual, row, atol=1e-8, rtol=1e-6, what=name)


@pytest.mark.parametrize("file", SCHEDULES, **by_name)
def test_noise_levels(file):
    """Keys are PRECOND_STEPS, with _sminX_smaxY_rhoZ where the defaults are changed; KEY_calls lists the network calls'
    levels."""
    _, arrays = goldens.load(file)
    classes = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}
    checked = 0
    for key, expected in arrays.items():
        kind, num_steps, *changes = key.removesuffix("_calls").split("_")
        names = {"smin": "sigma_min", "smax": "sigma_max", "rho": "rho"}
        changed = {names[c.rstrip("0123456789.")]: float(c.lstrip("abcdefghijklmnopqrstuvwxyz")) for c in changes}
        net = tiny(classes[kind])
        calls = called_sigmas(net, Sampling(num_steps=int(num_steps), **changed))
        levels = [calls[0], *calls[1::2], 0.0]  # every level but the first ends a step, where its second call is made
        actual = calls if key.endswith("_calls") else levels
        assert actual == (pytest.approx(expected.tolist(), rel=1e-6) if kind == "iddpm" else expected.tolist()), key
        checked += 1
    assert checked == len(arrays)


def tiny(class_name):
    model_type = "SongUNet" if class_name in ("EDMPrecond", "VPPrecond", "VEPrecond") else "DhariwalUNet"
    arch = {
        "img_resolution": 4,
        "img_channels": 3,
        "model_type": model_type,
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
    }
    return EDM().build({"class_name": class_name, **arch}).eval()


def called_sigmas(net, how, rng=None, labels=None):
    """Noise levels at which sample() calls the network."""
    calls = []
    handle = net.register_forward_pre_hook(lambda module, args: calls.append(args[1].item()))
    EDM().sample(net, rng or ImageRng([0]), labels, how)
    handle.remove()
    return calls


@pytest.mark.parametrize("file", SAMPLERS, **by_name)
def test_sampler(file):
    config, arrays = goldens.load(file)
    net = build(config, arrays)
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append(args))
    assert torch.equal(ImageRng(config["seeds"]).normal(arrays["latents"].shape[1:]), tensor(arrays["latents"]))
    labels = None
    if config["fixed_class"] is not None:
        labels = torch.full([len(config["seeds"])], config["fixed_class"])
    codes, used = EDM().sample(net, ImageRng(config["seeds"]), labels, Sampling(**config["sampler"]))
    if "class_labels" in arrays:
        assert torch.equal(used, tensor(arrays["class_labels"]).argmax(1))
    else:
        assert used is None
    if labels is None and "class_idx" in arrays:
        assert torch.equal(used, tensor(arrays["class_idx"]))
    np.testing.assert_allclose([float(sigma) for _, sigma, _ in calls], arrays["call_sigmas"], rtol=1e-15)
    for x, expected in zip([x for x, _, _ in calls][:: int(arrays["call_x_every"])], arrays["call_x"], strict=True):
        assert_close(x, expected, atol=1e-3 * float(expected.std()))
    assert codes.dtype == torch.float64
    assert_close(codes, arrays["out"], atol=1e-3 * float(arrays["out"].std()))
    assert torch.equal(to_uint8(tensor(arrays["out"]), "edm").permute(0, 2, 3, 1), tensor(arrays["images_uint8_nhwc"]))
    assert (
        to_uint8(codes, "edm").permute(0, 2, 3, 1).int() - tensor(arrays["images_uint8_nhwc"]).int()
    ).abs().max() <= 1


@pytest.mark.parametrize("file", GUIDED, **by_name)
@torch.no_grad()
def test_guided_sampler(file):
    config, arrays = goldens.load(file)
    net, guide = build(config, arrays), build(config, arrays)
    for parameter in guide.parameters():
        parameter.mul_(0.9)
    options = dict(config["sampler"])
    guided = NegativeGuidance(net, guide, options.pop("guidance", 1))
    codes, _ = EDM().sample(
        guided, ImageRng(config["seeds"]), None, Sampling(**{"num_steps": 32, **options}, state="float32")
    )
    assert codes.dtype == torch.float32
    assert_close(codes, arrays["out"], atol=1e-3 * float(arrays["out"].std()))


@pytest.mark.parametrize("file", GENERATORS, **by_name)
def test_image_streams(file):
    config, arrays = goldens.load(file)
    shape = (3, 32, 32)
    for num_classes in (10, 1000):
        rng = ImageRng(config["seeds"])
        latents = rng.normal(shape)
        rows, columns = arrays["latents_head"].shape[2:]
        assert torch.equal(latents[:, :, :rows, :columns], tensor(arrays["latents_head"]))
        assert_close(latents.double().mean(dim=(1, 2, 3)), arrays["latents_mean"], atol=1e-7)
        assert_close(latents.double().flatten(1).std(dim=1, correction=0), arrays["latents_std"], atol=1e-3, rtol=0)
        assert torch.equal(rng.integers(num_classes), tensor(arrays[f"labels{num_classes}"]))
        if num_classes == 10:
            rows, columns = arrays["noise64_head"].shape[2:]
            assert torch.equal(rng.normal(shape, torch.float64)[:, :, :rows, :columns], tensor(arrays["noise64_head"]))


@pytest.mark.parametrize("file", AUGMENTS, **by_name)
def test_augmentation(file):
    config, arrays = goldens.load(file)
    images = tensor(arrays["images"])
    pipe = augment.Pipe(p=config["p"], **config["kwargs"])
    torch.manual_seed(config["manual_seed"])
    draws = augment.draw(pipe, PublishedStream(len(images)))
    assert torch.equal(torch.rand(4), tensor(arrays["after"]))
    out, labels = augment.augment(pipe, images, draws)
    assert labels.shape[1] == pipe.label_dim
    assert_close(labels, arrays["labels"], atol=1e-6)
    assert_close(out, arrays["out"], atol=1e-5)


def objective_of(config):
    kind = {"EDMLoss": "edm", "VPLoss": "vp", "VELoss": "ve"}[config["loss"]]
    return Objective(kind=kind, augment=config["augment_p"] or 0.0, **config["loss_kwargs"])


def indices_of(labels):
    return labels.argmax(dim=1) if labels.shape[1] else None


def published_draws(net, images, labels, how):
    """The original draws label-dropout numbers only in networks that drop labels."""
    return EDM().draw(PublishedStream(len(images)), images, labels if net.model.label_dropout else None, how)


@pytest.mark.parametrize("file", LOSSES, **by_name)
def test_loss(file, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", goldens.dropout)
    config, arrays = goldens.load(file)
    net, how = build(config, arrays).train(), objective_of(config)
    images, labels = tensor(arrays["images"]), indices_of(tensor(arrays["labels"]))
    seen = []
    net.register_forward_pre_hook(lambda module, args, kwargs: seen.append((*args, kwargs)), with_kwargs=True)
    torch.manual_seed(config["manual_seed"])
    draws = published_draws(net, images, labels, how)
    losses = EDM().pixel_losses(net, images, labels, draws, how)
    assert torch.equal(torch.rand(4), tensor(arrays["after"]))
    net_input, sigma, _, keywords = seen[0]
    assert_close(sigma, arrays["sigma"], atol=0, rtol=1e-6)
    assert_close(net_input, arrays["net_input"], atol=1e-5, rtol=1e-5)
    if "augment_labels" in arrays:
        assert_close(keywords["augment_labels"], arrays["augment_labels"], atol=1e-6)
    assert_close(losses, arrays["loss"], atol=1e-4 * float(np.abs(arrays["loss"]).mean()), rtol=1e-4)
    total = losses.sum() / len(images)
    assert total.item() == pytest.approx(float(arrays["total"]), rel=1e-4)
    total.backward()
    names, parameters = zip(*net.named_parameters(), strict=True)
    assert list(names) == config["param_names"]
    assert [p.grad is not None for p in parameters] == arrays["grad_present"].tolist()
    norms = torch.stack([torch.zeros(()) if p.grad is None else p.grad.norm() for p in parameters])
    assert_close(norms, arrays["grad_norms"], atol=1e-5 * float(arrays["grad_norms"].max()), rtol=1e-3)


@pytest.mark.parametrize("file", LOSSES, **by_name)
def test_loss_of_an_image_is_the_sum_over_its_pixels(file, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", goldens.dropout)
    config, arrays = goldens.load(file)
    net, how = build(config, arrays).train(), objective_of(config)
    images, labels = tensor(arrays["images"]), indices_of(tensor(arrays["labels"]))
    torch.manual_seed(config["manual_seed"])
    losses = EDM().loss(net, images, labels, published_draws(net, images, labels, how), how)
    assert_close(losses, arrays["loss"].sum(axis=(1, 2, 3)), atol=0, rtol=1e-4)


@pytest.mark.parametrize("file", TRAIN_STEPS, **by_name)
def test_train_steps(file):
    config, arrays = goldens.load(file)
    train = config["train"]
    recipe = Training(
        images=10**9,
        batch=train["batch"],
        lr=train["lr"],
        lr_ramp_images=round(train["lr_rampup_kimg"] * 1000),
        ema_halflife_images=train["ema_halflife_kimg"] * 1000,
        ema_rampup_ratio=train["ema_rampup_ratio"],
        loss_scale=train["loss_scaling"],
        clean_gradients=True,
        max_grad_norm=1e30,  # clips nothing, gives the norm
        objective=Objective(augment=train.get("aug_p") or 0.0),
    )
    net = build(config, arrays).train()
    trainer = Trainer(EDM(), net, recipe, World(), images_seen=train.get("resume_nimg", 0))
    size = train["batch"] // train["rounds"]
    parts = iter(tensor(arrays["images_uint8"]).split(size))
    labels = iter(tensor(arrays["labels"]).split(size))
    poison_step, poisoned = train.get("poison") or (None, "")
    for step, row in enumerate(arrays["rows"]):
        images_seen, loss = trainer.images_seen, 0.0
        actual = [images_seen, lr_at(recipe, images_seen), ema_beta(recipe, images_seen, step)]
        for accumulation in range(train["rounds"]):
            images, classes = next(parts), indices_of(next(labels))
            torch.manual_seed(train["seed"] + 1000 * step + accumulation)
            draws = published_draws(net, images, classes, recipe.objective)
            loss += trainer.backward(images, classes, draws, recipe.batch)
        if step == poison_step:
            net.get_parameter(poisoned).grad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        trainer.update(loss)
        assert actual == pytest.approx(row[:3].tolist(), rel=1e-12)
        assert [loss * recipe.batch, trainer.last_grad_norm] == pytest.approx(row[3:].tolist(), rel=1e-4)
    names = [name for name, _ in net.named_parameters()]
    assert names == config["param_names"]
    assert_tables(dict(net.named_parameters()), names, arrays["net_table"])
    assert_tables(trainer.ema, names, arrays["ema_table"])


def assert_tables(tensors, names, table):
    """Mean, norm and first three values per parameter. The gradient of a key's bias is 0 in theory; Adam turns its
    rounding noise into steps of size lr, so only the query's and value's entries of qkv biases must agree."""
    for name, row in zip(names, table, strict=True):
        value = tensors[name].detach().double()
        head = torch.zeros(3, dtype=torch.float64)
        head[: min(3, value.numel())] = value.flatten()[:3]
        actual, kept = torch.cat([torch.stack([value.mean(), value.norm()]), head]), [0, 1, 2, 3, 4]
        if name.endswith("qkv.bias"):
            kept = [2, 4]
        assert_close(actual[kept], row[kept], atol=1e-6, rtol=1e-6, what=name)


@pytest.mark.parametrize("file", TRAIN_SCHEDULES, **by_name)
def test_rates_and_averages(file):
    """Rows are [images seen, lr, weight of the old average]. Snapshot names and ticks are habits of the original
    loop."""
    config, arrays = goldens.load(file)
    for run, about in config["runs"].items():
        args = about["args"]
        recipe = Training(
            images=args["total_kimg"] * 1000,
            batch=args["batch"],
            lr=args["lr"],
            lr_ramp_images=args["ramp"] * 1000,
            ema_halflife_images=args["half"] * 1000,
            ema_rampup_ratio=args["ratio"],
        )
        assert math.ceil(recipe.images / recipe.batch) == about["n_steps"]
        for index, row in enumerate([*arrays[f"{run}_rows_sub"], arrays[f"{run}_last_row"]]):
            images_seen = int(row[0])
            assert index == len(arrays[f"{run}_rows_sub"]) or images_seen == index * about["row_stride"] * recipe.batch
            assert lr_at(recipe, images_seen) == pytest.approx(row[1], rel=1e-12)
            assert ema_beta(recipe, images_seen, images_seen // recipe.batch) == pytest.approx(row[2], rel=1e-12)
        assert int(arrays[f"{run}_last_row"][0]) == (about["n_steps"] - 1) * recipe.batch


@pytest.mark.parametrize("file", DATASETS, **by_name)
def test_dataset(file):
    config, arrays = goldens.load(file)
    for case, about in enumerate(config["cases"]):
        options = about["kwargs"]
        found = goldens.published_subset(
            open_images(file.parent / config["zip"], use_labels=options["use_labels"]), options
        )
        assert len(found) == about["length"]
        assert found.path.stem == about["name"]
        assert found.shape == (about["num_channels"], about["resolution"], about["resolution"])
        assert torch.equal(found.read(range(len(found))), tensor(arrays[f"images_{case}"]))
        whole = open_images(file.parent / config["zip"])
        assert [whole.names.index(name) for name in found.names] == arrays[f"raw_idx_{case}"].tolist()
        expected = tensor(arrays[f"labels_{case}"])
        if about["label_dim"] == 0:
            assert found.labels is None
        elif found.labels.ndim == 2:
            assert torch.equal(found.labels, expected)
        else:
            assert torch.equal(torch.nn.functional.one_hot(found.labels, about["label_dim"]).float(), expected)


@pytest.mark.parametrize("file", MERGES, **by_name)
def test_merge(file):
    config, arrays = goldens.load(file)
    base, synth = ({key: tensor(arrays[f"{which}/{key}"]) for key in config["keys"]} for which in ("base", "aux"))
    parameters = {key for key in config["keys"] if key.endswith(("weight", "bias"))}
    for w in config["ws"]:
        merged = reverse_merge(base, synth, w, parameters=parameters, on_mismatch="keep_base")
        for key in config["keys"]:
            expected = tensor(arrays[f"w={w}/{key}"]) if key in parameters else base[key]
            assert_close(merged[key], expected, atol=1e-6 * float(expected.abs().max()), what=f"w={w} {key}")


@pytest.mark.parametrize("file", PICKLES, **by_name)
@torch.no_grad()
def test_pickles(file):
    """The pickle that the config names and every further one of its stem (but *_evil) hold the same network."""
    config, arrays = goldens.load(file)
    stem = config["pkl"].removesuffix(".pkl")
    evil = [p for p in file.parent.glob(f"{stem}*.pkl") if p.stem.endswith("_evil")]
    good = sorted(set(file.parent.glob(f"{stem}*.pkl")) - set(evil))
    assert file.parent / config["pkl"] in good
    expected = {key.removeprefix("sd/"): tensor(array) for key, array in arrays.items() if key.startswith("sd/")}
    for path in good:
        found = checkpoint.read(path)
        assert found.arch == {"class_name": config["class_name"], **config["init_kwargs"]}
        assert list(found.tensors) == list(expected)
        assert all(torch.equal(found.tensors[key], value) for key, value in expected.items())
        net = FAMILY().load(found).eval()
        out = net(tensor(arrays["x"]), torch.tensor([0.5, 3.0]), None)
        assert_denoised(out, arrays["out"], path.name)
    for path in evil:
        with pytest.raises(ValueError, match=path.name):
            checkpoint.read(path)


@pytest.mark.parametrize("name", sorted(p.stem for p in (goldens.MANIFESTS / "edm").glob("[!_]*.json")))
def test_manifest(name):
    about = json.loads((goldens.MANIFESTS / "edm" / "_configs.json").read_text())[name]
    with torch.device("meta"):
        net = EDM().build({"class_name": about["precond"], **about["init_kwargs"]})
    assert list(goldens.manifest_of(net).items()) == list(goldens.manifest("edm", name).items())
    parameters = dict(net.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == about["n_params"]
    assert hashlib.sha1("\n".join(parameters).encode()).hexdigest() == about["param_order_sha1"]
    if "attention_blocks" in about:
        assert [key.removesuffix(".qkv.weight") for key in parameters if key.endswith("qkv.weight")] == about[
            "attention_blocks"
        ]
