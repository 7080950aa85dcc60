"""VAR against the original code: transformer, sampler, training step, initialisation, data, uint8, merge."""

import json
import math

import numpy as np
import pytest
import torch

from neon.merge import reverse_merge
from neon.quantize import to_uint8
from neon.seeds import SharedRng
from tests import goldens
from tests.goldens import assert_close, load, tensor
from tests.var.networks import golden_transformer, golden_vqvae

# from var.crops import resized_crops, resized_size
from var.crops import resized_crops, resized_size
from var.family import FAMILY
from var.loss import token_loss
from var.options import Sampling
from var.sampler import gumbel_softmax, keep_likely, sample_scales
from var.transformer import Transformer, VARArch

goldens.reference_only("var", "schedule_sampler*.json", "eval_labels*.json")

ATOL = 5e-5


def by_name(file):
    return file.stem


@pytest.mark.parametrize("file", goldens.collect("var", "var_*_forward*.npz"), ids=by_name)
@torch.no_grad()
def test_teacher_forced_logits(file):
    config, arrays = load(file)
    model = golden_transformer(config).eval()
    for block in model.blocks if "scale_mul_override" in config else []:
        block.attn.scale_mul_1H11.copy_(torch.tensor(config["scale_mul_override"]).view(1, -1, 1, 1))
    torch.manual_seed(config["rng_seed"])
    is_dropped = torch.rand(config["batch"]) < config["cond_drop_rate"]
    assert torch.equal(is_dropped, tensor(arrays["drop_mask"]))
    labels = torch.where(is_dropped, config["num_classes"], tensor(arrays["label"]))

    outputs = {}
    for index in (0, len(model.blocks) - 1):
        model.blocks[index].register_forward_hook(lambda _m, _i, output, index=index: outputs.update({index: output}))
    logits = model(labels, tensor(arrays["x"]))
    assert_close(logits, arrays["logits"], atol=ATOL, what="logits")
    assert_close(outputs[0], arrays["block0"], atol=ATOL, what="first block")
    assert_close(outputs[len(model.blocks) - 1], arrays["block_last"], atol=ATOL, what="last block")

    state = model.state_dict()
    assert torch.equal(state["lvl_1L"], tensor(arrays["lvl_1L"]))
    assert torch.equal(state["attn_bias_for_masking"][0, 0].isfinite(), tensor(arrays["attn_bias_finite"]))


def golden_rng(config):
    """The original's one generator per call: seeded with g_seed, or the global one."""
    if config["g_seed"] is None:
        torch.manual_seed(config["glob_seed"])
        return SharedRng(config["B"])
    return SharedRng(config["B"], torch.Generator().manual_seed(config["g_seed"]))


def golden_labels(config, rng):
    label, classes = config["label"], config["num_classes"]
    if label is None:
        return rng.uniform_class(classes)
    labels = torch.tensor(label if isinstance(label, list) else [label] * config["B"])
    return torch.where(labels < 0, classes, labels)


@pytest.mark.parametrize("file", goldens.collect("var", "var_*_infer*.npz"), ids=by_name)
def test_sampled_tokens_and_images(file):
    goldens.skip_where_draws_are_mkls()
    config, arrays = load(file)
    model, vqvae = golden_transformer(config).eval(), golden_vqvae(config)
    rng = golden_rng(config)
    labels = golden_labels(config, rng)
    how = Sampling(
        cfg_scale=config["cfg"], top_k=config["top_k"], top_p=config["top_p"], more_smooth=config["more_smooth"]
    )
    scales = list(sample_scales(model, vqvae.quantize, rng, labels, how))

    # with more_smooth an error in the last scale's logits is multiplied by about 148
    atol = 5e-4 if config["more_smooth"] else 1e-5
    for index, scale in enumerate(scales):
        assert torch.equal(scale.indices, tensor(arrays[f"idx_{index}"])), f"tokens of scale {index}"
        if f"cfg_logits_{index}" in arrays:
            assert_close(
                scale.logits, arrays[f"cfg_logits_{index}"], atol=max(atol, ATOL), what=f"logits of scale {index}"
            )
        if f"h_{index}" in arrays:
            side = config["patch_nums"][index]
            h = scale.codes.transpose(1, 2).unflatten(2, (side, side))
            assert_close(h, arrays[f"h_{index}"], atol=5e-4, what=f"codes of scale {index}")
    if "cfg_logits_last_sub" in arrays:
        stored = arrays["cfg_logits_last_sub"]
        logits = scales[-1].logits
        assert_close(logits[:, :: math.ceil(logits.shape[1] / stored.shape[1])], stored, atol=ATOL, what="last logits")
    assert_close(scales[-1].f_hat, arrays["fhat"], atol=atol, what="f_hat")
    with torch.no_grad():
        images = (vqvae.decode(scales[-1].f_hat) + 1) / 2
    stride = config["img_sub"]
    assert_close(images[..., ::stride, ::stride], arrays["img"], atol=max(atol, ATOL), what="image")
    assert_close(torch.stack((images.mean(), images.std())), arrays["img_mean_std"], atol=ATOL, what="image statistics")


@pytest.mark.parametrize("file", goldens.collect("var", "sampling_ops*.npz"), ids=by_name)
def test_filtered_draws(file):
    config, arrays = load(file)
    logits = tensor(arrays["logits"])
    for n, (top_k, top_p) in enumerate(config["combos"]):
        likely = keep_likely(logits, top_k=top_k, top_p=top_p)
        assert torch.equal(likely, tensor(arrays[f"masked_{n}"])), f"filter {top_k}, {top_p}"
    goldens.skip_where_draws_are_mkls()
    for n, (top_k, top_p) in enumerate(config["combos"]):
        likely = keep_likely(logits, top_k=top_k, top_p=top_p)
        rng = SharedRng(len(logits), torch.Generator().manual_seed(config["seed"] + n))
        assert torch.equal(rng.categorical(likely.softmax(-1)), tensor(arrays[f"idx_{n}"])), f"draws {top_k}, {top_p}"
    rng = SharedRng(len(logits), torch.Generator().manual_seed(config["seed"] + 50))
    assert_close(gumbel_softmax(logits, 0.2, rng), arrays["gumbel"], atol=1e-6, what="gumbel")


def golden_draws(config):
    """The original's order in a training step: label drop, then per block with a rate the attention's and the MLP's
    path."""
    batch, depth, rate = config["batch"], config["depth"], config["drop_path_rate"]
    is_dropped = torch.rand(batch) < config["cond_drop_rate"]
    kept = torch.ones(batch, depth, 2, dtype=torch.bool)
    for block, block_rate in enumerate(np.linspace(0, rate, depth)):
        for branch in range(2) if block_rate > 0 and config["train_mode"] else []:
            kept[:, block, branch] = torch.empty(batch).bernoulli_(1 - block_rate).bool()
    return is_dropped, kept


@pytest.mark.parametrize("file", goldens.collect("var", "var_*train_step*.npz"), ids=by_name)
def test_training_steps(file):
    config, arrays = load(file)
    if config["drop_path_rate"]:
        goldens.skip_where_draws_are_mkls()
    model, vqvae = golden_transformer(config), golden_vqvae(config)
    parameters = dict(model.named_parameters())
    family = FAMILY()
    groups = {"g0": [], "g1": []}
    for name, parameter in parameters.items():
        groups["g1" if family.decays(name, parameter) else "g0"].append(name)
    assert groups == config["groups"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in groups["g0"]], "weight_decay": 0.0},
            {"params": [parameters[name] for name in groups["g1"]], "weight_decay": config["weight_decay"]},
        ],
        lr=config["lr"],
        betas=tuple(config["betas"]),
        eps=config["eps"],
    )
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    open_tokens = (
        sum(side**2 for side in config["patch_nums"][: config["prog_si"] + 1]) if config["prog_si"] >= 0 else None
    )
    first_scale = config["patch_nums"][0] ** 2
    grad_norms, updates = [], 0
    torch.manual_seed(config["rng_seed"])
    for step in range(config["steps"]):
        images = tensor(arrays["img_u8"][step]).float() / 127.5 - 1
        indices = vqvae.image_to_indices(images)
        targets = torch.cat(indices, dim=1)
        assert torch.equal(targets, tensor(arrays["gt_idx"][step]))
        is_dropped, kept = golden_draws(config)
        assert torch.equal(is_dropped, tensor(arrays["drop_mask"][step]))
        labels = torch.where(is_dropped, config["num_classes"], tensor(arrays["label"][step]))
        features = vqvae.quantize.teacher_input(indices)
        features = features if open_tokens is None else features[:, : open_tokens - first_scale]
        logits = model(labels, features, kept)
        loss = token_loss(logits, targets, label_smoothing=config["label_smooth"]).mean()
        if step == 0:
            assert_close(logits.detach(), arrays["logits_step0"], atol=ATOL, what="logits")
        assert loss.item() == pytest.approx(arrays["loss"][step], abs=1e-5)
        (loss / config["ac"]).backward()
        if (step + 1) % config["ac"]:
            assert np.isnan(arrays["grad_norm"][step])
            continue
        grad_norms.append([parameters[name].grad.norm().item() for name in config["param_names"]])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        assert norm.item() == pytest.approx(arrays["grad_norm"][step], abs=ATOL)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates += 1
    np.testing.assert_allclose(grad_norms, arrays["param_grad_norms"], atol=ATOL)
    assert updates == len(arrays["param_grad_norms"])

    # 2e-5 per entry; a norm over n entries that are each off by that much is off by at most sqrt(n) times as much
    after = {name: parameter.detach() for name, parameter in parameters.items()}
    moved = [(after[name] - before[name]).norm().item() for name in config["param_names"]]
    np.testing.assert_allclose(moved, arrays["delta_norm"], atol=2e-5)
    np.testing.assert_allclose(
        [after[name].norm().item() for name in config["param_names"]], arrays["after_norm"], atol=2e-5
    )
    for key in arrays:
        if key.startswith("after/"):
            assert_close(after[key.removeprefix("after/")], arrays[key], atol=2e-5, what=key)


def scales_with(count, num_tokens, least=1):
    """Some increasing sides whose squares sum to num_tokens; the file tells no more, and the initialisation depends on
    no more."""
    if count == 0:
        return () if num_tokens == 0 else None
    for side in range(least, math.isqrt(num_tokens) + 1):
        finer = scales_with(count - 1, num_tokens - side * side, side + 1)
        if finer is not None:
            return (side, *finer)
    return None


@pytest.mark.parametrize("file", goldens.collect("var", "var_init_stats*.json"), ids=by_name)
def test_initialisation(file):
    for name, want in json.loads(file.read_text()).items():
        check_initialisation(name, want)


def check_initialisation(variant, want):
    shapes = {name: entry["shape"] for name, entry in want["params"].items()}
    arch = VARArch(
        depth=want["depth"],
        embed_dim=want["embed_dim"],
        heads=want["heads"],
        patch_nums=scales_with(shapes["lvl_embed.weight"][0], shapes["pos_1LC"][1]),
        num_classes=shapes["class_emb.weight"][0] - 1,
        vocabulary=shapes["head.weight"][0],
        code_width=shapes["word_embed.weight"][1],
        shared_aln="shared_ada_lin.1.weight" in shapes,
        attn_l2_norm="blocks.0.attn.scale_mul_1H11" in shapes,
        drop_path=want["drop_path"][-1],
    )
    torch.manual_seed(0)
    model = Transformer(arch)
    assert [block.drop_path for block in model.blocks] == pytest.approx(want["drop_path"], abs=1e-7)
    parameters = dict(model.named_parameters())
    assert {name: list(parameter.shape) for name, parameter in parameters.items()} == shapes
    assert {n: [list(b.shape), str(b.dtype)] for n, b in model.state_dict().items() if n not in parameters} == want[
        "buffers"
    ]
    for name, stats in want["params"].items():
        values = parameters[name].detach()
        spread = 6 / math.sqrt(2 * values.numel())  # six standard errors of a standard deviation
        assert values.std().item() == pytest.approx(stats["std"], rel=2 * spread, abs=1e-12), f"{variant}: {name}"
        assert values.mean().item() == pytest.approx(
            stats["mean"], abs=12 * stats["std"] / math.sqrt(values.numel()) + 1e-6
        ), name


@pytest.mark.parametrize("file", goldens.collect("var", "data_aug*.npz"), ids=by_name)
def test_resized_crops(file):
    config, arrays = load(file)
    image = tensor(arrays["image"]).permute(2, 0, 1)[None]  # (1, 3, H, W)
    side, shorter = config["final_reso"], round(config["mid_reso"] * config["final_reso"])
    height, width = resized_size(*image.shape[2:], shorter)
    torch.manual_seed(config["seed"])
    for expected in tensor(arrays["train"]):
        is_flipped = torch.rand(1) < 0.5 if config["hflip"] else torch.tensor([False])
        top, left = torch.randint(0, height - side + 1, (1,)), torch.randint(0, width - side + 1, (1,))
        crop = resized_crops(image, shorter=shorter, side=side, top=top, left=left, is_flipped=is_flipped)
        assert torch.equal(crop[0], expected)
    centre = {"top": torch.tensor([round((height - side) / 2)]), "left": torch.tensor([round((width - side) / 2)])}
    crop = resized_crops(image, shorter=shorter, side=side, **centre, is_flipped=torch.tensor([False]))
    assert torch.equal(crop[0], tensor(arrays["val"]))


@pytest.mark.parametrize("file", goldens.collect("var", "png_quantise*.npz"), ids=by_name)
def test_uint8_rule(file):
    _, arrays = load(file)
    images = (
        tensor(arrays["x"]).double() * 2 - 1
    )  # double: the detour over [-1, 1] must not move a value across a level
    ours = to_uint8(images, "truncate").permute(1, 2, 0)
    assert torch.equal(ours, tensor(arrays["u8_float32"]))
    # the original rounded the image to half precision first; we do not, and may be one level off
    assert (ours.int() - tensor(arrays["u8_float16"]).int()).abs().max() <= 1


@pytest.mark.parametrize("file", goldens.collect("var", "neon_merge*.npz"), ids=by_name)
def test_merge(file):
    config, arrays = load(file)
    base, synth, merged = (
        {n.removeprefix(f"{s}/"): tensor(a) for n, a in arrays.items() if n.startswith(f"{s}/")} for s in "BAM"
    )
    ours = reverse_merge(base, synth, config["w"], on_mismatch="keep_base")
    assert ours.keys() == merged.keys()
    for name, value in merged.items():
        assert ours[name].shape == value.shape
        assert torch.equal(ours[name].isinf(), value.isinf()), name
        finite = ours[name].isfinite()
        largest = value[finite].abs().double().max().item()
        # half-precision entries of the original are merged in half; ours are rounded to half once
        atol = (torch.finfo(value.dtype).eps if value.dtype == torch.float16 else 1e-6) * max(largest, 1e-30)
        assert (ours[name][finite].double() - value[finite].double()).abs().max().item() <= atol, name
