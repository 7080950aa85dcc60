"""What would go wrong or slow on a GPU, on a machine without one: mixed devices raise, host reads are counted."""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fid.evaluator import measure
from fid.features import open_extractor
from fid.names import METRICS
from fid.reference import read_reference
from neon.evaluation.collect import Wanted, collect
from neon.family import Family, resolve
from neon.merge import LiveMerge
from neon.pipeline.experiment import Experiment, parse
from neon.runtime.distributed import World
from neon.sampling.generate import Source, generate, to_images
from neon.sampling.options import Sampling
from neon.training.loop import train_step
from neon.training.recipe import Training
from neon.training.trainer import Trainer
from tests.pretend_cuda import CUDA, OnCuda, pretend_cuda

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="torch 2.5 cannot pretend a GPU on a machine without one"
)
ROOT = Path(__file__).resolve().parents[2]
AUTOENCODERS = {"var": "var_fashion_tokeniser", "xar": "xar_fashion_vae"}
FAMILIES = ("edm", "var", "xar", "imm", "flow")
SAMPLERS = [
    *((name, {}) for name in FAMILIES),
    ("edm", {"S_churn": 10.0}),
    ("edm", {"state": "float32"}),
    ("var", {"more_smooth": True}),
    ("xar", {"solver": "ode"}),
    ("imm", {"sampler": "restart", "grid": "edm"}),
    ("flow", {"solver": "dopri5", "num_steps": None, "tol": 0.1}),
]
LOSSES = [
    *((name, {}) for name in FAMILIES),
    ("edm", {"kind": "vp"}),
    ("edm", {"kind": "ve"}),
    ("imm", {"times": "lognormal"}),
    ("flow", {"kind": "sb", "sigma": 0.5}),
    ("flow", {"kind": "si"}),
]


def named(case: object) -> str:
    """What pytest calls a case."""
    return case if isinstance(case, str) else ",".join(f"{key}={value}" for key, value in case.items()) or "default"


BATCH = 4
DOPRI5_READS = 30
SIDE = {"xar": 32}


def tables(family: str, sampling: dict, objective: dict) -> dict:
    name = "demo_base" if family == "edm" else f"tiny_{family}"
    found = tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text())
    found["sampling"] = {"edm": {"num_steps": 3, "uint8": "round"}}.get(family) or found["sampling"]
    found["sampling"] |= {"batch": BATCH, **sampling}
    found["sampling"] = {key: value for key, value in found["sampling"].items() if value is not None}
    recipe = {key: value for key, value in found["train"].items() if not key.startswith("images")}
    found["finetune"] = {**recipe, "images": 1000, "batch": BATCH, "lr_ramp_images": 0, "lr_cosine_images": 0}
    found["finetune"]["objective"] = {**recipe.get("objective", {}), **objective}
    return {key: found[key] for key in ("family", "sampling", "finetune", "model")}


def built(
    name: str, sampling: dict | None = None, objective: dict | None = None, model: dict | None = None
) -> tuple[Family, nn.Module, Experiment]:
    """On the CPU; families with an autoencoder get a fresh one."""
    table = tables(name, sampling or {}, objective or {})
    table["model"] = {**table["model"], **(model or {})}
    family = resolve(name)
    torch.manual_seed(0)
    network = family.build(table["model"])
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return family, network, parse(table)


def use_autoencoder(family: Family, name: str) -> None:
    if name in AUTOENCODERS:
        arch = tomllib.loads((ROOT / "configs" / f"{AUTOENCODERS[name]}.toml").read_text())["autoencoder"]["arch"]
        torch.manual_seed(0)
        autoencoder = family.trainable_autoencoder.build(arch)
        family.use(autoencoder.to(CUDA) if torch.utils._python_dispatch._len_torch_dispatch_stack() else autoencoder)


def source_of(family: Family, model: nn.Module, config: Experiment) -> Source:
    return Source(
        family=family,
        sampling=config.need("sampling", Sampling),
        labels="balanced",
        first_seed=0,
        num_classes=family.num_classes(model),
        cfg_scale=1.5 if family.is_guided else None,
    )


class Corpus:
    def __init__(self, codes: Tensor):
        self.codes, self.labels = codes, torch.arange(len(codes)) % 10

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, indices: object, /) -> Tensor:
        return self.codes[torch.as_tensor(list(indices))]


@pytest.mark.parametrize(("name", "how"), SAMPLERS, ids=named)
def test_sampling_and_decoding_on_a_gpu(name, how):
    """The images are those of the CPU; per network call the host reads nothing of the device."""
    family, model, config = built(name, how)
    model.eval().requires_grad_(False)
    use_autoencoder(family, name)
    expected = next(generate(source_of(family, model, config), model, [range(BATCH)], torch.device("cpu"))).codes
    pixels = to_images(source_of(family, model, config), expected)
    with pretend_cuda() as gpu, mock.patch.object(type(family), "graphed", return_value=None):
        family, model, config = built(name, how)
        model.to(CUDA).eval().requires_grad_(False)
        use_autoencoder(family, name)
        gpu.counts.clear()
        batch = next(generate(source_of(family, model, config), model, [range(BATCH)], CUDA))
        reads = gpu.counts["reads"]
        images = to_images(source_of(family, model, config), batch.codes)
        assert isinstance(batch.codes, OnCuda)
        assert isinstance(images, OnCuda)
        assert reads <= allowed_reads(name, how), gpu.counts
        assert gpu.counts["reads"] - reads <= 1, gpu.counts  # whether all pixels are numbers
    torch.testing.assert_close(batch.codes.inner, expected, rtol=0, atol=1e-4)
    assert (images.inner.int() - pixels.int()).abs().max() <= 1


def allowed_reads(name: str, how: dict) -> int:
    """Per batch, not per network call: EDM's noise levels, which the host's control flow follows. dopri5 is asked after
    every step."""
    if how.get("solver") == "dopri5":
        return DOPRI5_READS
    return 1 if name == "edm" else 0


@pytest.mark.parametrize(("name", "how"), LOSSES, ids=named)
def test_a_training_step_on_a_gpu(name, how):
    """Loss, clipping, optimiser and average; the batch's codes and draws are moved once. Autograd itself needs a real
    GPU: the gradients are given."""
    side = SIDE.get(name, 28)
    images = torch.randint(0, 256, (16, 1, side, side), dtype=torch.uint8)

    def given(loss: Tensor, *_: object, **__: object) -> None:
        assert loss.device == CUDA
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)

    with pretend_cuda() as gpu:
        family, model, config = built(name, objective=how)
        use_autoencoder(family, name)
        codes = family.encode(images.to(CUDA)).cpu()
        trainer = Trainer(family, model.to(CUDA), config.need("finetune", Training), World(device=CUDA))
        gpu.counts.clear()
        with mock.patch.object(Tensor, "backward", given), mock.patch("torch.random.fork_rng"):
            train_step(trainer, Corpus(codes))
        assert gpu.counts["reads"] <= 2, gpu.counts  # the loss that is logged, the norm that is clipped
    assert all(isinstance(parameter, OnCuda) for parameter in trainer.model.parameters())


def test_moving_the_weights_on_a_gpu():
    _, model, _ = built("edm")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    synth = {name: value + 0.01 if value.is_floating_point() else value for name, value in base.items()}
    with pretend_cuda():
        model = model.to(CUDA)
        LiveMerge(model, base, synth).set_w(1.5)
    LiveMerge(expected := built("edm")[1], base, synth).set_w(1.5)
    for (name, moved), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(moved.inner, wanted.data, msg=name)


def test_features_and_metrics_on_a_gpu():
    """Every metric, through `collect`: what is summed stays on the device, features come down once per batch."""
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    real = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8) // 2 + images // 2
    reference = read_reference(ROOT / "demo" / "reference_fashion-cnn.npz")
    reference_features = open_extractor("fashion-cnn")(real).pool

    def values(where: torch.device) -> dict[str, float]:
        wanted = [Wanted(extractor=open_extractor("fashion-cnn", device=where), metrics=METRICS)]

        def made(batches: Sequence[range]) -> Iterator[tuple[Sequence[int], Tensor]]:
            yield from ((indices, images[list(indices)].to(where)) for indices in batches)

        found = collect(made, wanted, range(64), 16, World(device=where), num_shown=2, desc="test")
        if where == CUDA:
            assert gpu.counts["reads"] <= 4 * 3 + 2, (
                gpu.counts
            )  # batch: features, logits, whether they are finite; shown images
        return measure(
            METRICS,
            generated=found.collectors[0],
            reference=reference,
            reference_features=reference_features,
            k=3,
            kid_subset=32,
        )

    expected = values(torch.device("cpu"))
    with pretend_cuda() as gpu:
        found = values(CUDA)
        assert gpu.counts["reads"] <= 60, gpu.counts
    assert len(expected) >= len(METRICS)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_inference", [False, True])
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(is_inference):
    with pretend_cuda() as gpu, torch.inference_mode(is_inference):
        on_gpu = torch.randn(3, 4).to(CUDA)
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and cpu"):
            on_gpu + torch.ones(3, 4)
        assert gpu.counts["to device"] == 1
        reads = [
            lambda: on_gpu.cpu(),
            lambda: on_gpu.to("cpu"),
            lambda: on_gpu.sum().item(),
            lambda: bool(on_gpu.sum() > 0),
            lambda: on_gpu[on_gpu > 0],
            lambda: torch.empty(3, 4).copy_(on_gpu),
        ]
        for count, read in enumerate(reads):
            assert gpu.counts["reads"] == count
            read()
            assert gpu.counts["reads"] == count + 1
        assert isinstance(on_gpu.to(CUDA, torch.float64), OnCuda)
        assert gpu.counts["reads"] == len(reads)
