"""neon.improve gives the numbers of `neon run`, on the notebook's toy and on the demo's EDM, and refuses what would not
be Neon."""

import copy
import functools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import neon
from edm.family import EDM
from edm.options import Objective, Sampling
from neon.checkpoints import checkpoint
from neon.library.fingerprint import fingerprint
from neon.library.functions import check_per_image, check_takes
from neon.library.improve import improved
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.quantize import to_uint8
from neon.runtime.distributed import World
from neon.seeds import SharedRng
from neon.toy.diffusion import LAST_TIME, signal
from neon.toy.target import COVARIANCE, distance
from tests.commands import ROOT
from tests.library.plane import TOY, Plane, trained

TOY_CONFIG = """
family = "tests.library.plane:PlaneFamily"
[base]
checkpoint = "{folder}/base.safetensors"
weights = "raw"
[sampling]
uint8 = "none"
batch = 64
[synth]
num_images = 1000
store = "codes"
[finetune]
images = 12500
batch = 250
lr = 2e-5
[select]
strategy = "grid"
w = [0.5, 1.0, 1.5, 2.0]
num_images = 2000
first_seed = 1000000
[report]
num_images = 2000
first_seed = 2000000
extractors = {{ "tests.library.plane:open_coordinates" = "{folder}/truth.npz" }}
num_shown = 0
"""


def sample(model: Plane, seeds):
    return TOY.sample(model.weights, neon.ImageRng(seeds).normal((2,))[None])[0]


def loss(model, points, labels, generator):
    time = LAST_TIME * torch.rand(len(points), 1, generator=generator)
    noise = torch.randn(points.shape, generator=generator)
    noisy = signal(time).sqrt() * points + (1 - signal(time)).sqrt() * noise
    return (TOY.predict_noise(model.weights, noisy[None], time[None])[0] - noise).square().mean(1)


def score(points):
    return distance(points[None]).item()


LOSS = "model, images, labels, generator"
SMALL = {"num_synth": 40, "updates": 4, "num_select": 40, "num_report": 40, "w": [1.0]}


def improve_toy(model, **changes):
    settings = {"num_synth": 1000, "updates": 50, "lr": 2e-5, "batch": 250, "num_select": 2000, "num_report": 2000}
    settings |= {"sample": sample, "loss": loss, "score": score}
    return neon.improve(model, **{**settings, **changes})


@pytest.fixture(scope="module")
def toy() -> Plane:
    return trained(steps=600)


@pytest.fixture(scope="module")
def found(toy):
    return improve_toy(toy)


def test_the_toy_gets_the_numbers_of_neon_run(toy, found, tmp_path):
    metadata = {"family": "tests.library.plane:PlaneFamily", "arch": {}, "weights": "raw"}
    checkpoint.write(tmp_path / "base.safetensors", toy.state_dict(), metadata=metadata)
    np.savez(tmp_path / "truth.npz", mu=np.zeros(2), sigma=COVARIANCE.numpy())
    (tmp_path / "toy.toml").write_text(TOY_CONFIG.format(folder=tmp_path))
    result = Run(load(tmp_path / "toy.toml"), tmp_path / "run", World()).all()
    assert found.w == result["w"]
    metric = result["select"]["metric"]
    points = {p["w"]: p["metrics"][metric] for p in result["select"]["points"] if p["direction"] == "synth"}
    assert dict(found.curve) == pytest.approx(points, rel=1e-4)  # float32 sums of features against float64
    rows = {name: row["metrics"][result["metric"]] for name, row in result["rows"].items()}
    assert found.scores == pytest.approx(rows, rel=1e-4)
    merged = checkpoint.read(tmp_path / "run/neon.safetensors", weights="any").tensors
    for name, value in found.weights.items():
        assert torch.equal(value, merged[name]), name


def test_the_toy_improves_on_held_out_noise_and_a_random_direction_does_not(found):
    scores = found.scores
    assert found.w > 0
    assert scores["neon"] < 0.8 * scores["base"] < scores["self-trained"]
    assert scores["random direction"] > 0.9 * scores["base"]


def test_the_weights_are_the_papers_line_and_score_what_is_said(toy, found):
    model = Plane()
    model.load_state_dict(found.weights)
    assert score(sample(model, range(2_000_000, 2_002_000))) == pytest.approx(found.scores["neon"], rel=1e-5)
    assert [w for w, _ in found.curve] == [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    at_base = score(sample(toy, range(1_000_000, 1_002_000)))
    assert dict(found.curve)[0.0] == pytest.approx(at_base, rel=1e-5)


def test_the_fine_tune_is_adam_on_the_documented_batches(toy, found):
    """An independent loop: the same S, order and draws, torch's Adam, then the difference form."""
    from neon.seeds import derived_seed

    model = Plane()
    model.load_state_dict(toy.state_dict())
    with torch.inference_mode():
        points = torch.cat([sample(model, range(start, min(start + 64, 1000))) for start in range(0, 1000, 64)])
    order = []
    for epoch in range(13):
        generator = torch.Generator().manual_seed(derived_seed(0, "epoch", epoch))
        order.append(torch.randperm(1000, generator=generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
    for step, batch in enumerate(torch.cat(order)[: 50 * 250].split(250)):
        generator = torch.Generator().manual_seed(derived_seed(0, "draws", step))
        optimizer.zero_grad()
        loss(model, points[batch].clone(), None, generator).mean().backward()
        optimizer.step()
    for name, base in toy.state_dict().items():
        expected = base - found.w * (model.state_dict()[name] - base)
        torch.testing.assert_close(found.weights[name], expected, rtol=0, atol=2e-6)


def test_the_callers_model_and_random_state_are_left_alone(toy):
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    improve_toy(toy, **SMALL)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())
    assert all(parameter.requires_grad for parameter in toy.parameters())


def test_a_page_is_named_if_it_stays(toy, tmp_path, capsys):
    improve_toy(toy, **SMALL)
    assert "report.html" not in capsys.readouterr().err
    improve_toy(toy, **SMALL, folder=tmp_path / "kept")
    assert f"{tmp_path}/kept/report.html" in capsys.readouterr().err


def test_a_folder_resumes_and_refuses_another_setting(toy, tmp_path):
    small = {**SMALL, "folder": tmp_path / "run"}
    first = improve_toy(toy, **small)
    ledger = (tmp_path / "run/ledger.jsonl").read_text()
    assert (tmp_path / "run/report.html").is_file()
    shutil.rmtree(tmp_path / "run/shown", ignore_errors=True)
    again = improve_toy(toy, **small)
    assert (tmp_path / "run/ledger.jsonl").read_text() == ledger
    assert again.scores == first.scores
    assert all(torch.equal(value, first.weights[name]) for name, value in again.weights.items())
    with pytest.raises(ValueError, match=r"begun with another setting: finetune\.lr is"):
        improve_toy(toy, **{**small, "lr": 1e-4})
    with pytest.raises(ValueError, match=r"begun with another setting: .*function"):
        improve_toy(toy, **small, sample=lambda model, seeds: sample(model, seeds))
    other = trained(steps=2)
    with pytest.raises(ValueError, match=r"begun with another model: layers\.0_bias differs"):
        improve_toy(other, **small)


def test_frozen_parameters_stay(toy):
    model = Plane()
    model.load_state_dict(toy.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.5"))
    found = improve_toy(
        model, num_synth=40, updates=4, num_select=40, num_report=40, w=[1.0], finetune={"ema_decay": 0.5}
    )
    moved = {name for name, value in found.weights.items() if not torch.equal(value, model.state_dict()[name])}
    assert moved <= {"layers.5_weight", "layers.5_bias"}
    assert found.details["step"]["relative_step"] > 0


def shared_noise(model, seeds):
    return TOY.sample(model.weights, neon.ImageRng([seeds[0]]).normal((len(seeds), 2)))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": shared_noise}, "sample: the image of seed 1 is another one when it is drawn alone"),
        ({"sample": lambda model, seeds: sample(model, seeds)[:1]}, r"sample: expected a tensor of 2 images"),
        ({"sample": lambda model, seeds: sample(model, seeds) * torch.nan}, "sample: .*not finite"),
        ({"sample": lambda model, seeds: (sample(model, seeds), torch.zeros(2))}, "sample: expected integer labels"),
        ({"loss": lambda *a: loss(*a).mean()}, r"loss: expected one number per image, shape \(250,\), got \(\)"),
        ({"loss": lambda *a: None}, r"loss: expected one number per image, shape \(250,\), got NoneType"),
        ({"score": lambda points: None}, "score: score must return one number for all images, it returned NoneType"),
        (
            {"score": lambda points: points[:, 0]},
            r"must return one number for all images, it returned a tensor \(2000,\)",
        ),
        ({"w": 1.0}, r"w must be a list of the steps to try, for example w=\[0\.5, 1\.0\], not float"),
        ({"finetune": {"lr": 1.0}}, "finetune: lr is said by an argument of neon.improve"),
        ({"finetune": {"arch": {"dropout": 0.1}}}, "finetune: arch changes nothing, the model is built already"),
        ({"score": lambda points: float("nan")}, "score: score gave nan for 2000 images"),
        ({"score": 3}, "expected a reference file or {extractor: file}, found 3"),
        ({"updates": 0}, r"finetune\.images must be >= 1"),
        ({"finetune": {"momentum": 0.9}}, r"\[finetune\] has no key 'momentum'"),
        ({"select_seed": 500}, "the seeds of synth .* and select .* overlap"),
        ({"strategy": "search"}, "strategy = 'search' judges noise by features"),
        ({"w": []}, r"\[select\] w must name at least one value"),
    ],
)
def test_what_would_not_be_neon_is_refused_in_one_line(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        improve_toy(toy, **changes)


def mixed(share, eps=0.0):
    """Every image with a share of its batch's mean, and with what kernels for a batch of this size round (relative)."""

    def of_batch(model, seeds):
        points = sample(model, seeds)
        signs = neon.ImageRng([len(seeds)] * len(seeds)).normal((2,)).sign()
        return (points + share * points.mean(0)) * (1 + eps * signs)

    return of_batch


@pytest.mark.parametrize("share", [0.03, 0.1])
def test_a_little_of_the_neighbours_is_refused(toy, share):
    """It passed: alone, an image moves by half of the share, and a tenth is what rounding may move it by."""
    with pytest.raises(ValueError, match=r"seed 1 is another one beside seed 2 than beside seed 0, by .* look across"):
        check_per_image(mixed(share), toy, 0)


def test_an_image_that_is_no_number_without_neighbours_is_refused(toy):
    """A little of the batch's deviation, which one image has not: S was made but for a last batch of one."""
    deviation = lambda model, seeds: sample(model, seeds) + 1e-4 * sample(model, seeds).std(0)  # noqa: E731
    with pytest.raises(ValueError, match="not finite where one is drawn alone, that of seed 1"):
        check_per_image(deviation, toy, 0)


@pytest.mark.parametrize("eps", [0.0, 2**-9, 2**-6])
def test_the_rounding_of_another_batch_size_is_none_of_the_neighbours(toy, eps):
    """2^-9 is bfloat16's; many steps blow it up. An image and its neighbours, one by one, are the same in any batch."""
    images, _ = check_per_image(mixed(0.0, eps), toy, 0)
    torch.testing.assert_close(images, sample(toy, [0, 1]), rtol=2 * eps + 1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_convolution_and_its_batch_statistics(precision):
    """The network's own running statistics: rounding alone. The batch's: refused, in any precision."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1)]
    network = nn.Sequential(*layers)

    def steps(model, seeds):
        x = neon.ImageRng(seeds).normal((1, 8, 8))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            for _ in range(20):
                x = 0.9 * x + 0.1 * model(x).float()
        return x

    check_per_image(steps, network, 0)
    network[1].track_running_stats, network[1].running_mean, network[1].running_var = False, None, None
    with pytest.raises(ValueError, match="is another one"):
        check_per_image(steps, network, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sample": lambda model: None},
            r"expected sample\(model, seeds\), it is sample\(model\): too many positional",
        ),
        (
            {"loss": lambda model, points, generator: None},
            r"expected loss\(model, images, labels, generator\), it is loss\(model, points, generator\): too many",
        ),
        ({"score": lambda points, reference: 0.0}, r"expected score\(images\), .*missing a required argument: 'refer"),
        ({"sample": torch.zeros(3)}, r"sample must be a function sample\(model, seeds\), not Tensor"),
        ({"loss": None}, r"loss must be a function loss\(model, images, labels, generator\), not NoneType"),
        ({"loss": lambda *a: None}, r"loss: expected one number per image, shape \(64,\), got NoneType"),
        ({"loss": lambda *a: loss(*a).mean()}, r"loss: expected one number per image, shape \(64,\), got \(\)"),
        ({"score": lambda points: None}, "score: score must return one number for all images, it returned NoneType"),
        ({"score": lambda points: torch.inf}, "score: score gave inf for 40 images"),
    ],
)
def test_functions_that_return_something_else_are_refused_before_the_fine_tune(toy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        improve_toy(toy, **{**SMALL, "batch": 64, "folder": tmp_path / "run", **changes})
    assert not (tmp_path / "run/finetune").exists()
    if "score" not in changes:
        assert not (tmp_path / "run/synth").exists()


def test_the_first_loss_changes_neither_the_model_nor_what_follows(toy, found):
    """It is tried on a copy, on images that `sample` made; a loss may differentiate by itself."""
    network, seen = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), []
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def by_gradient(model, points, labels, generator):
        seen.append((len(points), model is network))
        model.train()
        points = points.requires_grad_()
        (slope,) = torch.autograd.grad(model(points).square().sum(), points, create_graph=True)
        return slope.square().sum(1) + torch.rand(()) * 0

    def draw(model, seeds):
        return model(neon.ImageRng(seeds).normal((2,)))

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = {**SMALL, "sample": draw, "loss": by_gradient, "score": lambda points: points.mean().abs(), "batch": 8}
    improve_toy(network, **settings)
    assert torch.equal(torch.rand(3), expected)
    assert seen == [(8, False)] * 5, "one before S, four updates"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Aside(nn.Module):
    """It returns something else while it is trained, as networks with auxiliary heads do; one part stays frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen, self.kept = nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), None

    def forward(self, points):
        self.kept = torch.ones(2) if self.kept is None else self.kept  # made at the first call
        moved = self.frozen(self.layer(points)) * self.kept
        return (moved, points) if self.training else moved


def test_the_first_loss_is_that_of_the_fine_tune(toy):
    """Its mode, its precision; and two images, repeated, are no reason to refuse a loss that decorrelates a batch."""
    seen = []

    def loss_of_training(model, points, labels, generator):
        moved, _ = model(points.bfloat16())  # autocast makes it fit
        factor = torch.linalg.cholesky(torch.cov(torch.cat([points, points**2], 1).double().T))
        seen.append(model.training)
        return moved.float().square().mean(1) + 0 * factor.sum()

    network = Aside()
    modes = [module.training for module in network.modules()]

    def draw(model, seeds):
        return model(neon.ImageRng(seeds).normal((2,)))

    settings = {"sample": draw, "loss": loss_of_training, "score": lambda points: points.std(), "batch": 8}
    improve_toy(network, **{**SMALL, **settings}, finetune={"precision": "bf16"})
    assert seen == [True] * 4, "the one before S found no covariance; four updates"
    assert modes == [module.training for module in network.modules()]
    network(torch.ones(3, 2))[0].sum().backward()  # what the network kept of its first call can be differentiated
    with pytest.raises(ZeroDivisionError):
        improve_toy(network, **{**SMALL, **settings, "sample": lambda model, seeds: 1 / 0})
    assert modes == [module.training for module in network.modules()]


def test_a_decorator_that_gives_further_arguments_hides_them():
    def with_sigma(function):
        return functools.wraps(function)(lambda *arguments: function(*arguments, 1.0))

    check_takes("loss", with_sigma(lambda model, images, labels, generator, sigma: None), LOSS)
    check_takes("loss", functools.partial(lambda sigma, model, images, labels, generator: None, 1.0), LOSS)
    with pytest.raises(ValueError, match=r"expected loss\(model, images, labels, generator\), it is loss\(model\)"):
        check_takes("loss", functools.partial(lambda sigma, model: None, 1.0), LOSS)


def test_a_loss_that_draws_from_torchs_own_generator_repeats_too(toy):
    """Every update seeds it: what is drawn there instead of from `generator` is as reproducible."""

    def careless(model, points, labels, generator):
        return loss(model, points, labels, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))

    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runs.append(improve_toy(toy, **SMALL, loss=careless))
    assert runs[0].scores == runs[1].scores
    assert all(torch.equal(value, runs[1].weights[name]) for name, value in runs[0].weights.items())


@pytest.mark.parametrize(("model", "said"), [(Plane, "the class Plane"), ({}, "dict")], ids=["class", "state dict"])
def test_a_model_that_is_no_network_is_said(model, said):
    with pytest.raises(ValueError, match=f"model must be the network, a torch.nn.Module, not {said}"):
        improve_toy(model)


def hold_a_lock(model):
    model.inner = nn.Module()
    model.inner.lock = threading.Lock()


def hold_a_hook(model):
    lock = threading.Lock()
    model.inner = nn.Linear(2, 2)
    model.inner.register_forward_hook(functools.partial(print, lock))


def hold_what_was_computed(model):
    model.last = model.layers["0_weight"] * 2


@pytest.mark.parametrize(
    ("hold", "part"),
    [
        (hold_a_lock, r"inner\.lock \(lock: cannot pickle '_thread\.lock' object\)"),
        (hold_a_hook, r"inner\._forward_hooks \(OrderedDict: cannot pickle"),
        (hold_what_was_computed, r"last \(Tensor: Only Tensors created explicitly by the user"),
    ],
)
def test_a_model_that_cannot_be_copied_is_refused_by_the_part(toy, tmp_path, hold, part):
    """Python's own words name neither the part nor why a copy is needed."""
    model = Plane()
    model.load_state_dict(toy.state_dict())
    hold(model)
    with pytest.raises(ValueError, match=rf"^the model cannot be copied, .*: {part}.*; take that out of the model"):
        improve_toy(model, **SMALL, batch=8, folder=tmp_path / "run")
    assert not (tmp_path / "run/synth").exists()


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0.1, 0.9, r"reach from 0\.1 to 0\.9: return 2 \* x - 1"), (-3, 255, r"from -3 to 255: return x / 127\.5 - 1")],
)
def test_floats_in_another_range_are_no_images_for_an_extractor(toy, low, high, message):
    """Of a function of one's own nothing is asked; a reference file's extractor takes [-1, 1]."""
    picture = torch.linspace(low, high, 28 * 28).view(1, 1, 28, 28)

    def wrong(model, seeds):
        return torch.cat([picture.roll(seed, dims=-1) for seed in seeds])

    with pytest.raises(ValueError, match=message):
        neon.improve(toy, sample=wrong, loss=loss, score=str(ROOT / "demo/reference_fashion-cnn.npz"), num_synth=8,
                     updates=1, lr=1e-4)  # fmt: skip


def test_a_wrapped_or_frozen_model_is_refused(toy):
    with pytest.raises(ValueError, match=r"the model is wrapped .* give the inner one, model\.module"):
        improve_toy(nn.DataParallel(toy))
    with pytest.raises(ValueError, match=r"the model is wrapped .* give the inner one, model\._orig_mod"):
        improve_toy(torch.compile(toy))
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        improve_toy(trained(steps=1).requires_grad_(False))


def test_a_lambdas_fingerprint_without_source_is_its_code():
    space = {}
    exec("f = lambda x: x + 1\ng = lambda x: x - 1\nh = lambda x: x + 1", space)
    assert fingerprint(space["f"]) == fingerprint(space["h"])
    assert fingerprint(space["f"]) != fingerprint(space["g"])


def coarse_sample(model, seeds):
    return sample(copy.deepcopy(model).float(), seeds)


def coarse_loss(model, points, labels, generator):
    with torch.autocast("cpu", torch.bfloat16):
        return loss(model, points, labels, generator).float()


def test_a_fine_tune_that_moves_nothing_is_said_and_no_search_is_made(tmp_path, caplog):
    """In bfloat16 a small rate leaves every weight as it is: it read as "no w helped: w = 0 is best"."""
    with pytest.raises(ValueError, match="the fine-tune moved no weight, so that every w is the base"):
        improve_toy(
            trained(steps=2).bfloat16(),
            **SMALL,
            lr=1e-8,
            folder=tmp_path / "run",
            sample=coarse_sample,
            loss=coarse_loss,
        )
    assert "trained parameters are bfloat16: an update below about 1/256 of a weight is lost" in caplog.text
    assert not (tmp_path / "run/ledger.jsonl").exists()


STEPS, CALLS = 8, 0


def helped(x):
    return x + STEPS


def counting(model, seeds):
    global CALLS
    CALLS += 1
    return helped(model)


class Drawing:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, model, seeds):
        self.calls = getattr(self, "calls", 0) + 1
        return self.steps

    def draw(self, model, seeds):
        return self.steps


def closing_over(steps):
    return lambda model, seeds: steps


def with_default(steps):
    def draw(model, seeds, steps=steps):
        return steps

    return draw


def without_source(steps):
    space = {}
    exec(f"f = lambda model, seeds: {steps}", space)
    return space["f"]


MAKERS = {
    "partial": lambda steps: functools.partial(pow, steps),
    "positions": lambda steps: functools.partial(Drawing.draw, steps),
    "keywords": lambda steps: functools.partial(Drawing.draw, model=steps),
    "object": Drawing,
    "method": lambda steps: Drawing(steps).draw,
    "closure": closing_over,
    "settings": lambda steps: closing_over({"steps": steps, "range": (0.0, 1.0)}),
    "default": with_default,
    "no source": without_source,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_value_that_a_function_uses_is_part_of_it(kind):
    """A folder was continued with another number of steps: what a function closes over was not seen, and of a partial
    not even the function."""
    make = MAKERS[kind]
    assert fingerprint(make(8)) == fingerprint(make(8))
    assert fingerprint(make(8)) != fingerprint(make(18))


def test_globals_count_through_helpers_and_counters_do_not(monkeypatch):
    before = fingerprint(counting)
    counting(1, [0])
    assert fingerprint(counting) == before
    drawing = Drawing(8)
    drawing(1, [0])
    assert fingerprint(drawing) == fingerprint(Drawing(8))
    assert fingerprint(closing_over("cuda")) == fingerprint(closing_over("cpu"))  # a run may go on there
    monkeypatch.setitem(globals(), "STEPS", 18)
    assert fingerprint(counting) != before


def test_a_folder_is_not_continued_with_another_value(toy, tmp_path):
    def scaled(by):
        return lambda model, seeds: by * sample(model, seeds)

    improve_toy(toy, **SMALL, folder=tmp_path / "run", sample=scaled(1.0))
    improve_toy(toy, **SMALL, folder=tmp_path / "run", sample=scaled(1.0))
    with pytest.raises(ValueError, match=r"begun with another setting: .*function"):
        improve_toy(toy, **SMALL, folder=tmp_path / "run", sample=scaled(1.1))


def test_the_demos_edm_gets_the_numbers_of_neon_run(tmp_path):
    """The demo's model and recipe at a smaller size, once by the config and once by functions."""
    settings = ["synth.num_images=24", "finetune.images=64", "finetune.batch=16", "finetune.lr_ramp_images=32"]
    settings += ["select.strategy=grid", "select.num_images=20", "select.w=[1.0, 2.0]", "report.num_images=20"]
    settings += ["sampling.num_steps=3"]
    settings += [f'base.checkpoint="{ROOT}/demo/base.safetensors"', "finetune.lr=1e-3"]
    references = {name: str(ROOT / f"demo/reference_{name}.npz") for name in ("fashion-cnn", "pixel-pca64")}
    settings += ["report.extractors={" + ", ".join(f'"{k}"="{v}"' for k, v in references.items()) + "}"]
    result = Run(load(ROOT / "configs/demo.toml", settings), tmp_path / "run", World()).all()

    family, how = EDM(), Objective()
    model = family.load(checkpoint.read(ROOT / "demo/base.safetensors"))

    def draw(model, seeds):
        labels = torch.tensor([seed % 10 for seed in seeds])
        codes, labels = family.sample(model, neon.ImageRng(seeds), labels, Sampling(num_steps=3))
        return to_uint8(codes, "round"), labels

    def edm_loss(model, images, labels, generator):
        draws = family.draw(SharedRng(len(images), generator), images, labels, how)
        return family.loss(model, images, labels, draws, how)

    found = neon.improve(
        model, sample=draw, loss=edm_loss, score=references, num_synth=24, updates=4, batch=16, lr=1e-3, w=[1.0, 2.0],
        num_select=20, num_report=20, select_seed=100_000, report_seed=1_000_000,
        finetune={"lr_ramp_images": 32, "ema_power": 6.94}, folder=tmp_path / "improved",
    )  # fmt: skip
    assert found.w == result["w"]
    for mine, theirs in zip(found.details["select"]["points"], result["select"]["points"], strict=True):
        assert mine["metrics"] == theirs["metrics"]
    for name, row in result["rows"].items():
        assert found.details["rows"][name]["metrics"] == row["metrics"]
    merged = checkpoint.read(tmp_path / "run/neon.safetensors", weights="any").tensors
    assert all(torch.equal(value, merged[name]) for name, value in found.weights.items())
    assert json.loads(Path(tmp_path / "improved/result.json").read_text())["value"] == result["value"]


def test_the_curve_of_a_search_has_every_point_with_all_of_its_images():
    """A point that comes late begins with more images, so it has no score of the first ones' name: it was NaN."""
    points = [(-1.0, "fd60[x]"), (0.0, "fd60[x]"), (1.0, "fd60[x]"), (0.5, "fd153[x]")]
    select = {
        "metric": "fd60[x]",
        "points": [{"w": w, "direction": "synth", "metrics": {name: 9.0}} for w, name in points],
        "measured": [{"w": w, "value": value} for w, value in ((0.5, 1.0), (0.0, 2.0), (-1.0, 3.0), (1.0, None))],
    }
    details = {"select": select, "metric": "fd40[x]", "rows": {"neon": {"metrics": {"fd40[x]": 1.5}}}, "w": 0.5}
    curve = improved(details, {}).curve
    assert curve[:3] == [(-1.0, 3.0), (0.0, 2.0), (0.5, 1.0)]
    assert curve[3][0] == 1.0
    assert np.isnan(curve[3][1])


class TwoNames(nn.Module):
    """A layer that is used twice, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.tied = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.again, self.tied.weight = self.first, self.out.weight

    def forward(self, points):
        return self.tied(torch.tanh(self.out(self.again(torch.tanh(self.first(points))))))


@pytest.mark.parametrize("finetune", [{}, {"ema_decay": 0.5}])
def test_tied_weights_move_under_all_of_their_names(tmp_path, finetune):
    torch.manual_seed(0)
    network, folder = TwoNames(), tmp_path / "run"
    settings = {"sample": drawn_by, "loss": to_noise, "score": lambda points: -points.std(), "lr": 1e-2, "batch": 8}
    found = improve_toy(network, **{**SMALL, **settings}, finetune=finetune, folder=folder)
    (shot,) = (folder / "finetune").glob("snapshot-*")
    tuned = checkpoint.read(shot, weights="any").tensors
    assert found.w > 0
    for first, later in (("out.weight", "tied.weight"), ("first.weight", "again.weight"), ("first.bias", "again.bias")):
        base = network.state_dict()[first]
        torch.testing.assert_close(found.weights[first], base - found.w * (tuned[first] - base), rtol=0, atol=1e-6)
        assert torch.equal(tuned[later], tuned[first]), later
        assert torch.equal(found.weights[later], found.weights[first]), later
    network.load_state_dict(found.weights)
    assert -drawn_by(network, range(2_000_000, 2_000_040)).std().item() == pytest.approx(found.scores["neon"], rel=1e-5)
    assert checkpoint.read(folder / "neon.safetensors", weights="any").ties.keys() >= {"tied.weight", "again.weight"}


def test_labels_that_would_read_as_none_and_complex_images_are_refused(toy):
    """-1 for "no class" would have made all labels None; a score would have seen the real parts."""

    def labelled(model, seeds):
        return sample(model, seeds), torch.tensor([seed % 3 - 1 for seed in seeds])

    with pytest.raises(ValueError, match=r"labels must be class indices 0, 1, 2 \.\.\., found -1"):
        improve_toy(toy, **SMALL, sample=labelled)
    with pytest.raises(ValueError, match=r"codes of bfloat16 cannot be stored: .* return float32"):
        improve_toy(toy, **SMALL, sample=lambda model, seeds: sample(model, seeds).bfloat16())
    with pytest.raises(ValueError, match=r"sample: complex images .* torch\.view_as_real"):
        improve_toy(toy, **SMALL, sample=lambda model, seeds: torch.complex(*[sample(model, seeds)] * 2))


class Inner(nn.Module):
    """A network whose only part is called as a wrapper calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)

    def forward(self, points):
        return self.module(points)


def compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.Linear(2, 2))


@pytest.mark.parametrize("make", [Inner, compiled_part, lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))])
def test_names_like_those_of_wrappers_stay_the_networks_own(make):
    torch.manual_seed(0)
    network = make()
    found = improve_toy(network, **SMALL, sample=drawn_by, loss=to_noise, score=lambda points: -points.std().item())
    assert found.w > 0
    network.load_state_dict(found.weights)
    with torch.no_grad():
        again = -drawn_by(network, range(2_000_000, 2_000_040)).std().item()
    assert again == pytest.approx(found.scores["neon"], rel=1e-5)


def drawn_by(model, seeds):
    return model(neon.ImageRng(seeds).normal((2,)))


def to_noise(model, points, labels, generator):
    return (model(torch.randn(points.shape, generator=generator)) - points).square().mean(1)


def test_a_sampler_may_follow_a_gradient(toy):
    """Of an energy, or of a classifier that guides."""

    def downhill(model, seeds):
        points = neon.ImageRng(seeds).normal((2,))
        for _ in range(3):
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                (slope,) = torch.autograd.grad(model(points).square().sum(), points)
            points = points.detach() - 0.1 * slope
        return points

    network = nn.Linear(2, 2)
    found = improve_toy(network, **SMALL, sample=downhill, loss=to_noise)
    assert found.scores["base"] == pytest.approx(score(downhill(network, range(2_000_000, 2_000_040))), rel=1e-5)


def test_numbers_of_numpy_and_labels_of_any_integer_type_are_taken(toy):
    seen = set()

    def labelled(model, seeds):
        return sample(model, seeds), torch.tensor([seed % 2 for seed in seeds], dtype=torch.int32)

    def noting(model, points, labels, generator):
        seen.add((labels.dtype, *labels.unique().tolist()))
        return loss(model, points, labels, generator)

    numbers = {"w": np.array([1.0]), "synth_seed": np.int64(0), "num_synth": np.int32(40), "lr": np.float32(2e-5)}
    found = improve_toy(toy, **{**SMALL, **numbers}, sample=labelled, loss=noting)
    assert seen == {(torch.int64, 0, 1)}
    assert found.scores == improve_toy(toy, **SMALL, lr=float(np.float32(2e-5))).scores


class Breaks(nn.Module):
    """Its samples are no numbers once the step has carried its parameter below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, points):
        return points * torch.where(self.scale > 0, 1 + self.scale, torch.nan)


@pytest.mark.parametrize("kind", ["function", "file"])
def test_a_w_at_which_the_sampler_breaks_is_a_point_without_a_score(kind):
    def pictures(model, seeds):
        return torch.tanh(drawn_by(model, seeds))[:, :1, None, None] * torch.linspace(-1, 1, 28 * 28).view(1, 28, 28)

    def apart(model, points, labels, generator):
        return (model(torch.ones(len(points), 2)) - 9).square().mean(1)

    how = {"sample": drawn_by, "score": lambda points: -torch.linalg.eigvalsh(points.T.cov()).max().item()}
    if kind == "file":
        how = {"sample": pictures, "score": str(ROOT / "demo/reference_fashion-cnn.npz")}
    found = improve_toy(Breaks(), **{**SMALL, **how, "loss": apart, "lr": 3e-2, "batch": 8, "w": [0.1, 5.0]})
    values = dict(found.curve)
    assert np.isnan(values.pop(5.0))
    assert list(values) == [-1.0, 0.0, 0.1]
    assert np.isfinite([*values.values(), *found.scores.values()]).all()


class Beside(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}


def test_what_cannot_be_kept_or_moved_is_a_sentence():
    with pytest.raises(ValueError, match="the model's state dict holds _extra_state, a dict"):
        improve_toy(Beside(2, 2), **SMALL, sample=drawn_by, loss=to_noise)
    complex_one = {"a": torch.ones(2, dtype=torch.complex64)}
    network = nn.ParameterDict(complex_one)
    with pytest.raises(ValueError, match=r"a: a complex parameter cannot be extrapolated; .* torch\.view_as_real"):
        neon.LiveMerge(network, complex_one, complex_one)
