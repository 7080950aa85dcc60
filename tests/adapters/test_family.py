"""What the diffusers family promises: per-image generators, the loss of diffusers' own schedulers, exact LoRA, no
foreign code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from neon.family import resolve
from neon.seeds import ImageRng, SharedRng
from tests.adapters.pipelines import KINDS, PROMPTS, diffusers, flow_scheduler, saved, scheduler, unconditional, unet

from neon.adapters import lora  # isort: skip
from neon.adapters.diffusers_family import Diffusers, Objective, Sampling, read_prompts  # isort: skip
from neon.adapters.objective import forward_of  # isort: skip
from neon.adapters.pipeline_folder import PipelineFolder  # isort: skip


def opened(kind, folder, noise=None):
    family = Diffusers()
    path = saved(kind, folder, noise)
    base = family.read_base(path, weights="ema", prompts=folder / "prompts.txt" if kind == "text" else None)
    family.open(None, torch.device("cpu"))
    return family, family.load(base).eval()


def options(kind, **changes):
    return Sampling(**{"num_steps": 3, "cfg_scale": None if kind == "unconditional" else 2.0, **changes})


def test_the_name_resolves():
    assert isinstance(resolve("diffusers"), Diffusers)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_image_depends_on_its_seed_and_label_alone(kind, tmp_path):
    family, model = opened(kind, tmp_path)
    together, labels = family.sample(model, ImageRng([5, 6, 7]), None, options(kind))
    alone, _ = family.sample(model, ImageRng([7]), None if labels is None else labels[2:], options(kind))
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().mean() > 0.1


@torch.no_grad()
def test_images_are_those_of_the_pipelines_own_call(tmp_path):
    family, model = opened("text", tmp_path)
    mine, _ = family.sample(model, ImageRng([5, 6]), torch.tensor([2, 0]), options("text"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "text")
    generators = ImageRng([5, 6]).generators
    for generator in generators:
        torch.randint(3, (), generator=generator)  # the label that the image would have drawn
    prompts = [PROMPTS[2], PROMPTS[0]]
    theirs = pipeline(prompts, guidance_scale=2.0, generator=generators, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(mine, theirs * 2 - 1, rtol=0, atol=1e-5)
    assert family.num_classes(model) == 3
    assert family.img_size(model) == mine.shape[-1] == 16


def test_noise_outside_of_the_generators_is_refused(tmp_path):
    """DiTPipeline hands no generator to its scheduler: DDPM's noise would be the batch's."""
    family, model = opened("class", tmp_path, scheduler("DDPMScheduler"))
    with pytest.raises(ValueError, match=r"DiTPipeline with DDPMScheduler draws noise outside of its generators"):
        family.sample(model, ImageRng([0]), torch.tensor([3]), options("class"))
    images, _ = family.sample(model, ImageRng([0]), torch.tensor([3]), options("class", scheduler="DDIMScheduler"))
    assert images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_noised_images_and_targets_are_those_of_diffusers(name, prediction):
    options = {"num_train_timesteps": 40, "prediction_type": prediction}
    own = getattr(diffusers, name)(**options)
    own.set_timesteps(7)  # what sampling does to its tables must not reach the loss
    reference = diffusers.DDPMScheduler(**options)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 1, 4, 4, generator=generator)
    u = torch.rand(5, generator=generator)
    x_t, t, target = forward_of(own).noised(x, noise, u)
    assert torch.equal(t, (u * 40).long())
    torch.testing.assert_close(x_t, reference.add_noise(x, noise, t))
    velocity = reference.get_velocity(x, noise, t)
    torch.testing.assert_close(target, {"epsilon": noise, "sample": x, "v_prediction": velocity}[prediction])


def test_flow_matching_is_that_of_diffusers_and_one_exact_step_gives_the_image():
    own = flow_scheduler()
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 1, 4, 4, generator=generator)
    u = torch.rand(5, generator=generator)
    x_t, t, velocity = forward_of(own).noised(x, noise, u)
    torch.testing.assert_close(x_t, own.scale_noise(x, t, noise))
    own.set_timesteps(1)
    first = own.timesteps[0]
    start, time, velocity = forward_of(flow_scheduler()).noised(x, noise, torch.zeros(5))  # u = 0: pure noise
    assert torch.equal(time, first.expand(5))
    torch.testing.assert_close(own.step(velocity, first, start).prev_sample, x, rtol=0, atol=1e-5)


def test_another_kind_of_scheduler_is_refused():
    with pytest.raises(ValueError, match=r"CMStochasticIterativeScheduler .*expected a DDPM-like scheduler"):
        forward_of(diffusers.CMStochasticIterativeScheduler())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_error_of_the_prediction(kind, tmp_path):
    """By hand from the network's own call, with the posterior's sample and scaling where there is an autoencoder."""
    family, model = opened(kind, tmp_path)
    images = torch.randint(256, (2, 1 if kind == "unconditional" else 3, 16, 16), dtype=torch.uint8)
    labels = None if kind == "unconditional" else torch.tensor([2, 0])
    with torch.no_grad():
        codes = family.encode(images)
        draws = family.draw(SharedRng(2, torch.Generator().manual_seed(3)), codes.to("meta"), labels, Objective())
        found = family.loss(model, codes, labels, draws, Objective())
        x = images.float() / 127.5 - 1
        if kind != "unconditional":
            posterior = family.pipeline.vae.encode(x).latent_dist
            x = (posterior.mean + posterior.std * draws["posterior"] - 0.1) * 0.5
        t = (draws["time"] * 40).long()
        reference = diffusers.DDPMScheduler(num_train_timesteps=40)
        x_t = reference.add_noise(x, draws["noise"], t)
        if kind == "unconditional":
            out, target = model(x_t, t).sample, draws["noise"]
        elif kind == "class":
            out, target = model(x_t, t, class_labels=labels).sample[:, :4], draws["noise"]
        else:
            tokens = family.pipeline.tokenizer(
                [PROMPTS[2], PROMPTS[0]], padding="max_length", max_length=16, return_tensors="pt"
            ).input_ids
            hidden = family.pipeline.text_encoder(tokens)[0]
            out, target = model(x_t, t, hidden).sample, reference.get_velocity(x, draws["noise"], t)
    torch.testing.assert_close(found, (out - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dropped_prompt_is_the_empty_one(tmp_path):
    family, model = opened("text", tmp_path)
    codes = family.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).detach()
    (tmp_path / "prompts.txt").write_text("a red coat\na blue shoe\n")
    how = Objective(label_drop=1.0)
    draws = family.draw(SharedRng(1, torch.Generator().manual_seed(0)), codes, torch.tensor([0]), how)
    losses = [float(family.loss(model, codes, torch.tensor([i]), draws, how)) for i in (0, 1)]
    kept = [
        float(family.loss(model, codes, torch.tensor([i]), {**draws, "label_drop": torch.ones(1)}, how)) for i in (0, 1)
    ]
    assert losses[0] == losses[1] != kept[0] != kept[1]


def test_folded_lora_is_pefts_merge():
    """Linear layers and convolutions, the matrices moved away from zero."""
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = lora.add_lora(model, rank=3, alpha=6.0, targets=["to_q", "conv1", "conv_shortcut"], seed=0)
    untouched = lora.folded(adapted.state_dict(), scale=2.0)
    assert list(untouched) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in untouched.items())
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    mine = lora.folded(adapted.state_dict(), scale=2.0)
    from peft.tuners.lora import LoraLayer

    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    assert len(layers) > 4
    for layer in layers:
        layer.merge()
    theirs = lora.folded(adapted.state_dict(), scale=0.0)
    moved = [name for name in mine if not torch.equal(mine[name], before[name])]
    assert len(moved) == len(layers)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


def test_a_written_pipeline_has_the_weights_and_the_dtype_of_the_base(tmp_path):
    path = saved("unconditional", tmp_path)
    diffusers.DDIMPipeline(unet().half(), scheduler()).save_pretrained(path)
    (path / "unet" / "notes.txt").write_text("kept")
    folder = PipelineFolder.open(path)
    model = folder.read_model()
    assert next(model.parameters()).dtype == torch.float32
    weights = {name: value + 0.25 for name, value in model.state_dict().items()}
    folder.write_with(weights, tmp_path / "out")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=None)
    assert type(again) is diffusers.DDIMPipeline
    stored = PipelineFolder.open(tmp_path / "out")
    assert stored.dtype == torch.float16
    for name, value in stored.read_model().state_dict().items():
        assert torch.equal(value, weights[name].half().float()), name
    assert (tmp_path / "out/unet/notes.txt").read_text() == "kept"
    assert not list(tmp_path.glob(".*.tmp"))


def edit(path, **changes):
    file = path / "model_index.json"
    index = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def rename(path):
    file = path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name.replace("conv_in.bias", "other"): value for name, value in weights.items()}, file)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(path):
    """Weights as a pickle that makes a file."""
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.bias": Payload(path.parent / "ran")}, path / "unet/diffusion_pytorch_model.bin")


def shards_elsewhere(path):
    """An index whose shard lies outside of the folder."""
    (path / "unet/diffusion_pytorch_model.safetensors").rename(path.parent / "elsewhere.safetensors")
    names = load_file(path.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../elsewhere.safetensors")}
    (path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("given", "meant"), [("mine/unet", "mine"), ("run", "run/pipeline")])
def test_a_folder_near_a_pipeline_is_told_with_the_pipelines_own(tmp_path, given, meant):
    unconditional().save_pretrained(tmp_path / meant)
    with pytest.raises(FileNotFoundError, match=f"no model_index.json in it. Did you mean {tmp_path / meant}\\?"):
        PipelineFolder.open(tmp_path / given)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda p: (p / "model_index.json").unlink(), FileNotFoundError, "expected a diffusers pipeline folder"),
        (lambda p: (p / "model_index.json").write_text("{"), ValueError, "not valid JSON"),
        (lambda p: (p / "model_index.json").write_text("[]"), ValueError, "expected a JSON object, found list"),
        (lambda p: (p / "model_index.json").write_text('{"a":' + "[" * 100_000), ValueError, "not valid JSON"),
        (lambda p: edit(p, _class_name=7), ValueError, "_class_name: 7 is no DiffusionPipeline class of diffusers"),
        (lambda p: edit(p, _class_name="UNet2DModel"), ValueError, "'UNet2DModel' is no DiffusionPipeline class"),
        (lambda p: edit(p, _class_name="../mine"), ValueError, "'../mine' is no DiffusionPipeline class"),
        (lambda p: edit(p, _class_name="utils.os"), ValueError, "'utils.os' is no DiffusionPipeline class"),
        (lambda p: edit(p, scheduler=["os", "system"]), ValueError, "scheduler is 'system' of 'os'; only classes"),
        (lambda p: (p / "unet/config.json").write_text("{"), ValueError, "config.json: not valid JSON"),
        (lambda p: (p / "unet/config.json").write_text("[]"), ValueError, "config.json: expected a JSON object"),
        (lambda p: (p / "unet/config.json").unlink(), FileNotFoundError, "config.json"),
        (lambda p: edit(p, _class_name="Evil"), ValueError, "_class_name: 'Evil' is no DiffusionPipeline class"),
        (lambda p: edit(p, _class_name=["mine", "Evil"]), ValueError, "is no DiffusionPipeline class of diffusers"),
        (lambda p: edit(p, unet=["mine", "Net"]), ValueError, "unet is 'Net' of 'mine'; only classes of diffusers"),
        (lambda p: edit(p, unet=["diffusers", "Nothing"]), ValueError, "does not serve a Nothing yet"),
        (lambda p: edit(p, unet=["diffusers", "DDIMScheduler"]), ValueError, "does not serve a DDIMScheduler yet"),
        (lambda p: edit(p, unet=["transformers", "UNet2DModel"]), ValueError, "does not serve a UNet2DModel"),
        (shards_elsewhere, ValueError, "must be plain filenames"),
        (pickled, OSError, "Unable to load weights"),
        (lambda p: edit(p, unet=None), ValueError, "expected one denoiser .*found none"),
        (lambda p: edit(p, transformer=["diffusers", "UNet2DModel"]), ValueError, "found unet, transformer"),
        (lambda p: (p / "unet/diffusion_pytorch_model.safetensors").unlink(), FileNotFoundError, "no weights in it"),
        (lambda p: (p / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50), OSError, "Unable to load"),
        (
            lambda p: rename(p),
            ValueError,
            "its weights are not those of the UNet2DModel in config.json: .*conv_in.bias",
        ),
    ],
)
def test_broken_and_hostile_folders_are_refused(tmp_path, break_it, error, message):
    path = saved("unconditional", tmp_path)
    (path / "unet" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    break_it(path)
    with pytest.raises(error, match=message):
        Diffusers().read_base(path, weights="ema", prompts=None)
    assert not (tmp_path / "ran").exists()


def test_prompts_belong_to_text_models_alone(tmp_path):
    saved("unconditional", tmp_path)
    saved("text", tmp_path)
    with pytest.raises(ValueError, match=r"\[base\]: .*DDIMPipeline, which takes no prompts"):
        Diffusers().read_base(tmp_path / "unconditional", weights="ema", prompts=tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline, which needs prompts"):
        Diffusers().read_base(tmp_path / "text", weights="ema", prompts=None)
    with pytest.raises(ValueError, match=r"\[base\] prompts: the family 'edm' takes no prompts"):
        resolve("edm").read_base(tmp_path, weights="ema", prompts=tmp_path / "prompts.txt")
    with pytest.raises(FileNotFoundError, match=r"no such file .*nothing\.txt"):
        read_prompts(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("pipeline", "part", "network", "config", "message"),
    [
        ("DDIMPipeline", "unet", "UNet2DModel", {"num_class_embeds": 10}, "UNet2DModel with num_class_embeds"),
        (
            "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel", {"addition_embed_type": "text_time"},
            "UNet2DConditionModel with addition_embed_type",
        ),
        ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel", {}, "SD3Transformer2DModel"),
        ("FluxPipeline", "transformer", "FluxTransformer2DModel", {}, "FluxTransformer2DModel"),
    ],
)  # fmt: skip
def test_networks_that_are_told_more_are_refused_before_anything_is_read(
    tmp_path, pipeline, part, network, config, message
):
    """With the way that is open: there are no weights in these folders."""
    (tmp_path / part).mkdir()
    index = {"_class_name": pipeline, part: ["diffusers", network]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / part / "config.json").write_text(json.dumps({"_class_name": network, **config}))
    with pytest.raises(ValueError, match=rf"does not serve a {message} yet .*`neon merge` makes Neon's weights"):
        Diffusers().read_base(tmp_path, weights="ema", prompts=None)


def test_the_hash_is_of_the_whole_pipeline_and_of_the_prompts(tmp_path):
    path = saved("text", tmp_path)
    prompts = tmp_path / "prompts.txt"

    def sha256():
        return Diffusers().read_base(path, weights="ema", prompts=prompts).sha256

    first = sha256()
    assert sha256() == first
    config = path / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    second = sha256()
    prompts.write_text("another\n")
    assert len({first, second, sha256()}) == 3
