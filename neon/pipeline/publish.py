"""`neon publish RUN`: a finished run as a folder ready for upload: weights, config, model card, pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from neon.checkpoints import checkpoint
from neon.report.card import model_card
from neon.store import files, records

PAGES = ("report.html", "report.png")


def publish(run: Path, out: Path) -> dict[str, object]:
    """Write the folder `out`; it appears whole or not at all, and takes the place of an earlier one that this made.

    For a diffusers run it is the pipeline folder itself, so that DiffusionPipeline.from_pretrained(OWNER/NAME) works,
    with the low-rank fine-tune's small `adapter`; else model.safetensors with its config.json. Beside them README.md
    (the card), neon.json (protocol and numbers), and the run's page with its pictures.
    Raises FileNotFoundError if the run is not finished, ValueError if it has no numbers, if its weights are not those
    of its result, or if `out` is something else.
    """
    result = read_result(run)
    if out.exists() and not (out / "neon.json").is_file():
        raise ValueError(f"{out} is there and was not made by `neon publish`; name another folder with --out")
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        pipeline = run / "pipeline"
        if pipeline.is_dir():
            shutil.copytree(pipeline, beside)
            if (run / "adapter").is_dir():
                shutil.copytree(run / "adapter", beside / "adapter")
        else:
            beside.mkdir(parents=True)
            shutil.copy2(run / "neon.safetensors", beside / "model.safetensors")
            files.write_text(beside / "config.json", json.dumps(own_config(run, result), indent=1) + "\n")
        for page in PAGES:
            if (run / page).is_file():
                shutil.copy2(run / page, beside)
        records.write_json(result, beside / "neon.json")
        files.write_text(
            beside / "README.md",
            model_card(result, is_pipeline=pipeline.is_dir(), has_adapter=(beside / "adapter").is_dir()),
        )
        shutil.rmtree(out, ignore_errors=True)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    written = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return {"out": str(out), "files": written, "w": result["w"], "metric": result["metric"], "value": result["value"]}


def read_result(run: Path) -> dict:
    """result.json of a finished run whose neon.safetensors is the one that it measured."""
    if not (run / "result.json").is_file():
        raise FileNotFoundError(
            f"{run}: no result.json, so the run is not finished; `neon run CONFIG --out {run}` goes on"
        )
    result = records.read_json(run / "result.json")
    expected, found = result["hashes"]["neon_sha256"], files.sha256_of(run / "neon.safetensors")
    if found != expected:
        raise ValueError(
            f"{run / 'neon.safetensors'} is not the file that result.json measured (sha256 {found[:12]}..., expected "
            f"{expected[:12]}...); run `neon run` again"
        )
    if None in (result["value"], result["base_value"]):
        raise ValueError(f"{run}: there are no numbers to publish; {result['verdict']}")
    return {key: value for key, value in result.items() if key != "merged"}  # a path of this machine


def own_config(run: Path, result: Mapping) -> dict[str, object]:
    """What `neon` and people need to build the network: the metadata of the weights' own header."""
    meta = checkpoint.read(run / "neon.safetensors", weights="any").meta
    return {**meta, "sampling": result["config"]["sampling"], "formula": result["formula"]}
