"""LoRA: Neon's adapter on the base is the merge of the full weights; PEFT and diffusers themselves apply it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from neon.checkpoints import checkpoint
from neon.merge import reverse_merge
from neon.merge_files.merging import merge
from neon.merge_files.pairing import Request
from tests.hub.test_folders import gpt, pipeline

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")


def trained(model: nn.Module, seed: int, **options: object) -> nn.Module:
    """The model with an adapter whose factors are random, as after a fine-tune."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(0.1 * torch.randn_like(value))
    return adapted


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The network with its adapter folded in, under the names of the bare one."""
    merged = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
    return {name: value.detach().clone() for name, value in merged.named_parameters()}


OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "rank_pattern": {"c_fc": 2},
        "alpha_pattern": {"h.1.attn.c_attn": 5},
    },
    "embedding": {"r": 2, "lora_alpha": 8, "target_modules": ["wpe"]},
    "whole module": {
        "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_peft_adapters(tmp_path: Path, kind: str) -> None:
    gpt(1).save_pretrained(tmp_path / "base")
    base = weights(gpt(1))
    trained(gpt(1), 5, **OPTIONS[kind]).save_pretrained(tmp_path / "adapter")
    synth = weights(trained(gpt(1), 5, **OPTIONS[kind]))
    expected = {
        name: (base[name].double() - 1.5 * (synth[name].double() - base[name].double())).float() for name in base
    }
    assert max((expected[name] - base[name]).abs().max().item() for name in base) > 0.01

    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "neon", Request(w=(1.5,)))
    found = weights(peft.PeftModel.from_pretrained(gpt(1), tmp_path / "neon"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "full", Request(w=(1.5,), lora="full"))
    full = weights(type(gpt(1)).from_pretrained(tmp_path / "full"))
    for name, value in expected.items():
        torch.testing.assert_close(full[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[name], full[name], rtol=0, atol=1e-6)


class Tied(nn.Module):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.body, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.body(self.embed(indices)))


@pytest.mark.filterwarnings("ignore:Model with")  # PEFT: an adapter on a tied weight
@pytest.mark.parametrize("module", ["embed", "head"])
def test_a_tied_weight_takes_its_update_under_all_of_its_names(tmp_path: Path, module: str) -> None:
    """As PEFT folds it in. A tied network that loads both names is left with the later one's: it was the base's."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": [module]}
    torch.save(Tied().state_dict(), tmp_path / "base.pth")
    trained(Tied(), 5, **options).save_pretrained(tmp_path / "adapter")
    base, synth = weights(Tied()), weights(trained(Tied(), 5, **options))
    expected = reverse_merge(base, synth, 1.5)
    assert (expected["embed.weight"] - base["embed.weight"]).abs().max() > 0.01
    full = tmp_path / "full.safetensors"
    merge(tmp_path / "base.pth", tmp_path / "adapter", full, Request(w=(1.5,), lora="full"))
    found = Tied(2)
    checkpoint.read(full, weights="any").load_into(found)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model with")
def test_two_updates_of_one_tied_weight_are_refused(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "base.pth")
    trained(Tied(), 5, r=2, lora_alpha=4, target_modules=["embed", "head"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are one tensor .* two updates"):
        merge(tmp_path / "base.pth", tmp_path / "adapter", tmp_path / "full.safetensors", Request(w=(1,), lora="full"))


def test_two_adapters_are_extrapolated_as_updates_and_not_factor_by_factor(tmp_path: Path) -> None:
    options = [OPTIONS["plain"], OPTIONS["plain"] | {"r": 2, "lora_alpha": 1}]
    for name, seed, own in (("base", 5, options[0]), ("synth", 6, options[1])):
        trained(gpt(1), seed, **own).save_pretrained(tmp_path / name)
    merge(tmp_path / "base", tmp_path / "synth", tmp_path / "neon", Request(w=(1.5,)))
    found = weights(peft.PeftModel.from_pretrained(gpt(1), tmp_path / "neon"))
    base, synth = (weights(trained(gpt(1), seed, **own)) for seed, own in ((5, options[0]), (6, options[1])))
    for name, value in reverse_merge(base, synth, 1.5).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


def test_a_diffusers_unet_and_its_lora_file(tmp_path: Path) -> None:
    made = pipeline(1)
    made.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"])
    made.unet.add_adapter(config)
    with torch.no_grad():
        for name, value in made.unet.named_parameters():
            if "lora_" in name:
                value.add_(0.1 * torch.randn_like(value))
    layers = peft.get_peft_model_state_dict(made.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "adapter", unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    merge(tmp_path / "base", file, tmp_path / "neon.safetensors", Request(w=(0.8,)))
    merge(tmp_path / "base", file, tmp_path / "full", Request(w=(0.8,), lora="full"))

    expected = weights(pipeline(1).unet)
    for name in expected:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in layers:
            down, up = layers[f"{module}.lora_A.weight"], layers[f"{module}.lora_B.weight"]
            step = (2 * up.double().flatten(1) @ down.double().flatten(1)).reshape(expected[name].shape)
            expected[name] = (expected[name].double() - 0.8 * step).float()
    full = weights(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "full" / "unet"))
    applied = pipeline(1)
    applied.load_lora_weights(tmp_path, weight_name="neon.safetensors")
    applied.unet.fuse_lora()
    applied.unload_lora_weights()
    found = weights(applied.unet)
    for name, value in expected.items():
        torch.testing.assert_close(full[name], value, rtol=0, atol=1e-7)
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def kohya(path: Path, dtype: torch.dtype = torch.float32, alpha: tuple[int, ...] = ()) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    held = {}
    for module, shape in (("to_q", (6, 5)), ("conv_in", (4, 3, 3, 3))):
        key = f"lora_unet_blocks_0_{module}"
        held[f"{key}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=g).to(dtype)
        held[f"{key}.lora_up.weight"] = torch.randn(shape[0], 2, *(1 for _ in shape[2:]), generator=g).to(dtype)
        held[f"{key}.alpha"] = torch.ones(alpha, dtype=dtype)
    safetensors.torch.save_file(held, path, metadata={"ss_network_dim": "2"})
    return held


@pytest.mark.parametrize("alpha", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kohyas_layout(tmp_path: Path, dtype: torch.dtype, alpha: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base = {"blocks.0.to_q.weight": torch.randn(6, 5), "blocks.0.conv_in.weight": torch.randn(4, 3, 3, 3)}
    base["blocks.0.to_q.bias"] = torch.randn(6)
    safetensors.torch.save_file(base, tmp_path / "base.safetensors")
    held = kohya(tmp_path / "lora.safetensors", dtype, alpha)
    given = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    merge(*given, tmp_path / "full.safetensors", Request(w=(1.2,), lora="full"))
    merge(*given, tmp_path / "neon.safetensors", Request(w=(1.2,)))
    full = safetensors.torch.load_file(tmp_path / "full.safetensors")
    neon = safetensors.torch.load_file(tmp_path / "neon.safetensors")
    assert torch.equal(full["blocks.0.to_q.bias"], base["blocks.0.to_q.bias"])
    for module in ("to_q", "conv_in"):
        key, name = f"lora_unet_blocks_0_{module}", f"blocks.0.{module}.weight"
        step = (
            0.5
            * held[f"{key}.lora_up.weight"].double().flatten(1)
            @ held[f"{key}.lora_down.weight"].double().flatten(1)
        )
        assert torch.equal(full[name], (base[name].double() - 1.2 * step.reshape(base[name].shape)).float())
        assert neon[f"{key}.alpha"].shape == alpha
        scale = neon[f"{key}.alpha"].item() / 2
        assert scale == 1.0
        applied = (
            scale
            * neon[f"{key}.lora_up.weight"].double().flatten(1)
            @ neon[f"{key}.lora_down.weight"].double().flatten(1)
        )
        torch.testing.assert_close(applied, -1.2 * step, rtol=2e-7, atol=1e-7)
    with safetensors.safe_open(tmp_path / "neon.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"


def test_check_reads_an_adapter_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file({"blocks.0.to_q.weight": torch.ones(6, 5)}, tmp_path / "base.safetensors")
    kohya(tmp_path / "lora.safetensors")
    given = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    merge(*given, tmp_path / "neon.safetensors", Request(w=(1.2,), check=True))
    write = checkpoint.write_streaming

    def damaging(path: Path, specs: dict[str, Tensor], values: object, **more: object) -> None:
        write(path, specs, {name: torch.zeros_like(value) for name, value in specs.items()}.items(), **more)

    monkeypatch.setattr(checkpoint, "write_streaming", damaging)
    with pytest.raises(ValueError, match=r"lora_unet_blocks_0_.* read differently from what was written"):
        merge(*given, tmp_path / "neon.safetensors", Request(w=(1.2,), check=True))


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    one = torch.ones(2, 2)
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file({"a.weight": one}, base)
    out = tmp_path / "out.safetensors"
    files = {
        "dora": ({"a.lora_down.weight": one, "a.lora_up.weight": one, "a.dora_scale": one}, "no plain LoRA"),
        "loha": ({"a.hada_w1_a": one}, "no plain LoRA"),
        "half": ({"a.lora_down.weight": one}, "only one of their two factors: a"),
        "ranks": ({"a.lora_down.weight": torch.ones(3, 2), "a.lora_up.weight": one}, "do not fit each other"),
        "peft": ({"base_model.model.a.lora_A.weight": one, "base_model.model.a.lora_B.weight": one}, "adapter_config"),
        "other": ({"b.lora_down.weight": one, "b.lora_up.weight": one}, "1 modules .* are in no network"),
        "shape": ({"a.lora_down.weight": torch.ones(1, 7), "a.lora_up.weight": torch.ones(2, 1)}, "does not fit"),
        "nan": ({"a.lora_down.weight": one, "a.lora_up.weight": one, "a.alpha": torch.tensor(torch.nan)}, "alpha nan"),
    }
    for name, (held, message) in files.items():
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({key: value.clone() for key, value in held.items()}, path)
        with pytest.raises(ValueError, match=message):
            merge(base, path, out, Request(w=(1.0,), lora="full"))
        assert not out.exists()
    folder = tmp_path / "peft"
    folder.mkdir()
    safetensors.torch.save_file(
        {key: value.clone() for key, value in files["peft"][0].items()}, folder / "adapter_model.safetensors"
    )
    for config, message in (
        ({"peft_type": "LOHA"}, "no plain LoRA"),
        ({"use_dora": True}, "no plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
        ({"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}, "regular expression"),
        ({"lora_alpha": "x"}, "expected a number"),
        ({"lora_alpha": 1e999}, "expected a number"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            merge(base, folder, tmp_path / "new", Request(w=(1.0,)))
    assert checkpoint.read(base, weights="auto").tensors["a.weight"].tolist() == [[1, 1], [1, 1]]
