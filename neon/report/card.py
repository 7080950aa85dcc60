"""The model card of a published run: what it is, how to load it, numbers with their controls, protocol, citation."""

from __future__ import annotations

from collections.abc import Mapping

from neon.store import hub

CITATION = """@inproceedings{neon2026,
  title  = {Neon: Negative Extrapolation From Self-Training Improves Image Generation},
  year   = {2026},
  note   = {ICLR 2026, arXiv:2510.03597},
  url    = {https://arxiv.org/abs/2510.03597}
}"""

ROWS = {
    "base": "base model (w = 0)",
    "self-trained": "self-trained (w = -1), a control",
    "random direction": "a random direction of the same length, a control",
    "neon": "**Neon**",
}


def model_card(result: Mapping, *, is_pipeline: bool, has_adapter: bool = False) -> str:
    """README.md in the Hub's form, from a run's result.json. is_pipeline: the folder is one of diffusers.
    has_adapter: there is a low-rank adapter in it."""
    config = result["config"]
    base = config["base"]["checkpoint"]
    found = hub.REMOTE.match(base)
    front = ["---", "tags:", "- neon", "- image-generation"]
    front += ["library_name: diffusers"] if is_pipeline else []
    front += [f"base_model: {found['repo']}"] if found else []
    kind = "text-to-image" if config["base"].get("prompts") else "unconditional-image-generation"
    front += [f"pipeline_tag: {kind}", "---"]
    change = 100 * (result["value"] / result["base_value"] - 1) if result["base_value"] else 0.0
    family = config["family_name"]
    reason = "" if result["comparable"] else f": {result['reason']}"
    shown = "![The curve over w, and the same noise through base and Neon](report.png)\n\n"
    return (
        "\n".join(front)
        + f"""
# {family}, improved by Neon

These weights are `{result["formula"]}` with **w = {result["w"]:g}**{_guidance(result)}
([Neon, arXiv 2510.03597](https://arxiv.org/abs/2510.03597)): the base model sampled a synthetic set, was fine-tuned on
it briefly, and was then moved the other way. No new data were used; size and sampling speed are the base's.

Base: `{found[0] if found else base.rsplit("/", 1)[-1]}`, sha256 `{result["hashes"]["base_sha256"]}`. The license of the
base holds for these weights too.

{shown}## Numbers

{result["metric"]} on held-out noise: {result["base_value"]:.4g} -> **{result["value"]:.4g}** ({change:+.0f} %).
{"Comparable" if result["comparable"] else "Not comparable"} with published FIDs{reason}.
{_verdict(result)}
{_table(result)}

## Protocol

{_protocol(result)}

Every value, hash and version: `neon.json`; the page of the run: `report.html`.

## Use

{_use(result, is_pipeline)}
{_use_of_adapter(result) if has_adapter else ""}

## Citation

```bibtex
{CITATION}
```
"""
    )


def _verdict(result: Mapping) -> str:
    return f"\n{result['verdict']}\n" if isinstance(result.get("verdict"), str) else ""


def _guidance(result: Mapping) -> str:
    scale = result.get("cfg_scale")
    return "" if scale is None else f", to be sampled with **cfg_scale = {scale:g}**"


def _table(result: Mapping) -> str:
    names = list(result["rows"]["neon"]["metrics"])
    places = ["w"] if result["rows"]["neon"].get("cfg_scale") is None else ["w", "cfg_scale"]
    lines = ["| " + " | ".join(["weights", *places, *names]) + " |", "|---|" + "---|" * len(places + names)]
    for name, row in result["rows"].items():
        at = [f"{row[place]:g}" for place in places]
        values = [f"{row['metrics'][n]:.4g}" if n in row["metrics"] else "-" for n in names]
        lines.append("| " + " | ".join([ROWS.get(name, name), *at, *values]) + " |")
    return "\n".join(lines)


def _protocol(result: Mapping) -> str:
    config = result["config"]
    lines = []
    for section in ("sampling", "synth", "finetune", "select", "report"):
        values = {k: v for k, v in (config.get(section) or {}).items() if v not in (None, {}, [])}
        lines.append(f"- {section}: " + ", ".join(f"{key} `{_short(value)}`" for key, value in values.items()))
    lines.append("- seeds: image i of a block has seed first_seed + i; synth, select and report are disjoint")
    return "\n".join(lines)


def _short(value: object) -> str:
    return ", ".join(f"{k} = {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _use(result: Mapping, is_pipeline: bool) -> str:
    if is_pipeline:
        return """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("OWNER/NAME")
```"""
    family = result["config"]["family_name"]
    if family == "neon.improve":
        return """```python
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))    # the network that neon.improve was given
```"""
    scale = result.get("cfg_scale")
    guidance = "" if scale is None else f" --set report.cfg_scale={scale:g}"
    return f"""```
neon eval CONFIG --checkpoint hf://OWNER/NAME/model.safetensors --weights any{guidance}
```"""


def _use_of_adapter(result: Mapping) -> str:
    base = result["config"]["base"]
    found = hub.REMOTE.match(base["checkpoint"])
    name = found["repo"] if found else "BASE"
    if base.get("prompts"):
        apply = 'pipeline.load_lora_weights("OWNER/NAME", subfolder="adapter")'
    else:
        apply = 'pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, "OWNER/NAME", subfolder="adapter")'
    return f"""
Or the base with the small file in `adapter/`, which is all that was changed:

```python
pipeline = DiffusionPipeline.from_pretrained("{name}")
{apply}
```"""
