"""The optional speed modes change only rounding: the same images, the same weights, and a model that can still be moved
and trained."""

from pathlib import Path

import pytest
import torch

from edm.family import EDM
from edm.options import Objective
from edm.options import Sampling as Heun
from neon.checkpoints import checkpoint
from neon.merge import LiveMerge
from neon.runtime.distributed import World
from neon.sampling.generate import Source, generate, to_images
from neon.sampling.options import Sampling
from neon.training.loop import train_step
from neon.training.recipe import Training
from neon.training.trainer import Trainer
from tests import goldens
from tests.edm.published import TINY

ROOT = Path(__file__).resolve().parents[2]


def network():
    return goldens.seed_by_name(EDM().build({**TINY, "augment_dim": 0, "dropout": 0.0})).eval()


def images(net, *, batch: int = 4, **mode) -> torch.Tensor:
    sampling = Sampling(options=Heun(num_steps=4), batch=batch, uint8="round", **mode)
    source = Source(family=EDM(), sampling=sampling, labels="balanced", first_seed=3, num_classes=4)
    return torch.cat([part.codes for part in generate(source, net, [range(4)], torch.device("cpu"))])


@pytest.mark.parametrize(("mode", "tolerance"), [({"channels_last": True}, 1e-4), ({"precision": "bf16"}, 0.2)])
def test_sampling(mode, tolerance):
    exact, fast = images(network()), images(network(), **mode)
    assert 0 < (exact - fast).abs().max() < tolerance  # not 0: the mode did something


def test_grey_levels_do_not_depend_on_the_batch():
    """The trained demo model: at most one grey level on at most 0.01 % of the pixels, however the images are
    grouped."""
    net = EDM().load(checkpoint.read(ROOT / "demo/base.safetensors")).eval()
    sampling = Sampling(options=Heun(num_steps=6), uint8="round")
    source = Source(family=EDM(), sampling=sampling, labels="balanced", first_seed=0, num_classes=10)

    def made(*sizes: int) -> torch.Tensor:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        batches = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        return torch.cat(
            [to_images(source, part.codes) for part in generate(source, net, batches, torch.device("cpu"))]
        )

    together = made(32).int()
    for sizes in ((1, 31), (7, 7, 7, 7, 4)):
        difference = (made(*sizes).int() - together).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() <= 1e-4
    assert together.float().std() > 10  # they show something


def test_a_model_that_has_sampled_channels_last_can_be_moved_and_trained():
    net = network()
    base = {name: value.clone() for name, value in net.state_dict().items()}
    synth = {name: value + 0.01 for name, value in base.items()}
    images(net, channels_last=True)
    LiveMerge(net, base, synth).set_w(1.0)
    name = "model.enc.8x8_conv.weight"
    torch.testing.assert_close(net.get_parameter(name).detach(), base[name] - 0.01)
    trainer = Trainer(
        EDM(), net.requires_grad_(True), Training(images=8, batch=8, lr=1e-3, objective=Objective()), World()
    )
    train_step(trainer, Pixels())  # a parameter made in inference mode could not be changed
    moved = net.get_parameter(name).detach() - (base[name] - 0.01)
    assert 0 < moved.abs().max() < 2e-3  # Adam's first step is the rate, at most


class Pixels:
    labels = torch.arange(16) % 4

    def __len__(self) -> int:
        return 16

    def read(self, indices):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=generator)[list(indices)]


@pytest.mark.parametrize(("mode", "tolerance"), [({"channels_last": True}, 2e-5), ({"precision": "bf16"}, 0.2)])
def test_training(mode, tolerance):
    def trained(**options) -> dict[str, torch.Tensor]:
        recipe = Training(
            images=32, batch=8, lr=1e-3, eps=1e-2, objective=Objective(), **options
        )  # eps: updates follow the gradients
        net = network().requires_grad_(True)
        if recipe.channels_last:
            net.to(memory_format=torch.channels_last)
        trainer = Trainer(EDM(), net, recipe, World())
        for _ in range(3):
            train_step(trainer, Pixels())
        return {name: value.detach() for name, value in net.named_parameters()}

    exact, fast, start = trained(), trained(**mode), dict(network().named_parameters())
    moved = torch.cat([(exact[name] - start[name]).flatten() for name in exact]).norm()
    apart = torch.cat([(exact[name] - fast[name]).flatten() for name in exact]).norm()
    assert 0 < apart < tolerance * moved
