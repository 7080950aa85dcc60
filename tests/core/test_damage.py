"""A run folder whose bytes were changed: an error that names the file and the remedy, or the file is made again. Never
another number."""

import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fid.files import data_offset
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.runtime.distributed import World
from neon.search.ledger import ENTRY
from neon.store import records
from tests.core.test_run import run, without_times


@pytest.fixture
def finished(line_config, tmp_path) -> tuple[Path, Path, dict]:
    folder = tmp_path / "run"
    return line_config, folder, json.loads(json.dumps(without_times(run(line_config, folder))))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def middle_of(path: Path, key: str) -> int:
    """Where the bytes of an array inside a zip lie."""
    return path.read_bytes().index(f"{key}.npy".encode()) + 200


def middle_of_largest(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    return data_offset(path, member) + member.file_size // 2


def again(config: Path, folder: Path) -> dict:
    return json.loads(json.dumps(without_times(run(config, folder))))


def test_a_flipped_byte_in_a_shard_is_named_and_only_that_shard_is_made_again(finished):
    config, folder, result = finished
    shard = folder / "synth/shard-000001.npz"
    whole = shard.read_bytes()
    flip(shard, middle_of(shard, "codes"))
    with pytest.raises(ValueError, match=r"shard-000001\.npz: damaged .*Delete this file and run the same command"):
        run(config, folder)
    shard.unlink()
    others = {p: p.stat().st_mtime_ns for p in (folder / "synth").glob("shard-*") if p != shard}
    assert again(config, folder) == result
    assert shard.read_bytes() == whole
    assert {p: p.stat().st_mtime_ns for p in others} == others


@pytest.mark.parametrize("name", ["snapshot-000000000048.safetensors", "snapshot-000000000096.safetensors", "state.pt"])
def test_a_flipped_byte_in_a_snapshot_or_the_state_is_named(finished, name):
    config, folder, result = finished
    path = folder / "finetune" / name
    flip(path, middle_of_largest(path) if name == "state.pt" else path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{name}: damaged.*Delete .*finetune and run the same command again"):
        run(config, folder)
    for file in (folder / "finetune").iterdir():
        file.unlink()
    assert again(config, folder) == result


def test_a_missing_snapshot_is_named(finished):
    config, folder, _ = finished
    (folder / "finetune/snapshot-000000000048.safetensors").unlink()
    with pytest.raises(ValueError, match=r"snapshot-000000000048\.safetensors: missing"):
        run(config, folder)


def test_every_digit_of_the_ledger_counts(finished):
    """A changed digit of a metric, of a hash, of a key: named by line; without the line, computed again."""
    config, folder, result = finished
    ledger = folder / "ledger.jsonl"
    whole = ledger.read_text()
    digits = [i for i, c in enumerate(whole) if c.isdigit()]
    for i in random.Random(0).sample(digits, 5):
        ledger.write_text(whole[:i] + str((int(whole[i]) + 1) % 10) + whole[i + 1 :])
        number = whole[:i].count("\n") + 1
        with pytest.raises(ValueError, match=rf"ledger\.jsonl, line {number}: damaged.*Delete this line"):
            Run(load(config), folder, World()).ledger  # noqa: B018
    lines = whole.splitlines(keepends=True)
    ledger.write_text("".join(lines[:2] + lines[3:]))
    assert again(config, folder) == result


@pytest.mark.parametrize("garbage", [b"\xff\xfe{", b"[1]\n", b"{]\n", b"\0" * 40 + b"\n"])
def test_a_ledger_or_manifest_that_cannot_be_read_is_named(finished, garbage):
    config, folder, _ = finished
    ledger = folder / "ledger.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(garbage.rstrip(b"\n") + b"\n" + whole)
    with pytest.raises(ValueError, match=r"ledger\.jsonl, line 1: damaged"):
        run(config, folder)
    ledger.write_bytes(whole)
    (folder / "synth/manifest.json").write_bytes(garbage)
    with pytest.raises(ValueError, match=r"synth/manifest\.json: damaged.*delete this file"):
        run(config, folder)
    (folder / "synth/manifest.json").unlink()
    assert "value" in run(config, folder)


def test_damaged_pictures_are_made_again(finished, caplog):
    config, folder, result = finished
    shown = sorted((folder / "shown").glob("*.npz"))
    before = {path: np.load(path)["images"].copy() for path in shown}
    flip(shown[0], middle_of(shown[0], "images") - 150)
    shown[1].write_bytes(b"")
    shown[2].unlink()
    assert again(config, folder) == result
    assert f"{shown[0]}: damaged" in caplog.text
    for path, images in before.items():
        assert np.array_equal(np.load(path)["images"], images)


def test_a_damaged_half_point_begins_again(line_config, tmp_path, monkeypatch):
    monkeypatch.setattr(records.Saver, "is_due", property(lambda self: True))
    unbroken = json.loads(json.dumps(without_times(run(line_config, tmp_path / "unbroken"))))
    folder = tmp_path / "run"
    killed = Run(load(line_config), folder, World())
    saved = []

    def save(self, state):
        records.save_state(state, self.path)
        if "partial" in str(self.path):
            saved.append(self.path)
            if len(saved) == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.Saver, "save", save)
        with pytest.raises(KeyboardInterrupt):
            killed.all()
    flip(saved[-1], saved[-1].stat().st_size // 2)
    assert json.loads(json.dumps(without_times(run(line_config, folder)))) == unbroken


def test_settings_of_layout_do_not_forbid_to_go_on(finished):
    config, folder, result = finished
    ledger = (folder / "ledger.jsonl").read_bytes()
    other = ["sampling.batch=11", "synth.shard_images=7", "finetune.micro_batch=3", "sampling.channels_last=true"]
    changed = run(config, folder, *other, "finetune.channels_last=true", "report.num_shown=20")
    assert (folder / "ledger.jsonl").read_bytes() == ledger
    assert changed["value"] == result["value"]
    shown = sorted((folder / "shown").glob("*.npz"))
    assert {len(np.load(path)["images"]) for path in shown} == {20}


def test_a_half_made_set_goes_on_with_its_own_shards(line_config, tmp_path):
    whole = run(line_config, tmp_path / "whole")
    folder = tmp_path / "run"
    Run(load(line_config), folder, World()).synth()
    (folder / "synth/shard-000003.npz").unlink()
    result = run(line_config, folder, "synth.shard_images=30", "sampling.batch=16")
    assert result["value"] == pytest.approx(whole["value"], rel=1e-12)  # sums of other batches


def as_before(folder: Path) -> None:
    """The folder as versions without seals, hashes of snapshots and keys of identity wrote it."""
    records.write_json(records.read_manifest(folder / "synth"), folder / "synth/manifest.json")
    lines = []
    for line in records.read_lines(folder / "ledger.jsonl"):
        old = {k: line[k] for k in ENTRY}
        key = records.key_of(old)
        (folder / "shown" / f"{line['key'][:16]}.npz").exists() and (
            folder / "shown" / f"{line['key'][:16]}.npz"
        ).rename(folder / "shown" / f"{key[:16]}.npz")
        lines.append({"key": key, **old, "metrics": line["metrics"], "seconds": line["seconds"]})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = torch.load(folder / "finetune/state.pt", weights_only=True)
    del state["snapshots"]
    records.save_state(state, folder / "finetune/state.pt")


def test_a_folder_of_an_earlier_version_goes_on(line_config, tmp_path, monkeypatch):
    """Nothing is computed again, whatever its layout; the numbers say that nobody noted their versions."""
    for module in ("neon.pipeline.run", "neon.evaluation.evaluate"):
        monkeypatch.setattr(f"{module}.source_sha256", lambda kind: None)  # they did not look at sources
    folder = tmp_path / "run"
    result = run(line_config, folder)
    as_before(folder)
    ledger = (folder / "ledger.jsonl").read_bytes()
    found = run(line_config, folder, "sampling.batch=9")
    assert (folder / "ledger.jsonl").read_bytes() == ledger
    assert found["value"] == result["value"]
    assert found["versions"] is None


def test_numbers_keep_the_versions_that_made_them(finished, monkeypatch):
    config, folder, result = finished
    today = records.made_with
    monkeypatch.setattr(records, "made_with", lambda world: {**today(world), "versions": {"torch": "99.0"}})
    assert again(config, folder)["versions"] == result["versions"]


def test_an_edited_family_or_extractor_of_ones_own_is_noticed(finished, monkeypatch):
    config, folder, _ = finished
    ledger = len(records.read_lines(folder / "ledger.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr("neon.evaluation.evaluate.source_sha256", lambda kind: "edited")
        run(config, folder)
    assert len(records.read_lines(folder / "ledger.jsonl")) == 2 * ledger
    monkeypatch.setattr("neon.pipeline.run.source_sha256", lambda kind: "edited")
    with pytest.raises(ValueError, match="begun with another setting: family_source"):
        run(config, folder)


def test_no_pictures(line_config, tmp_path):
    result = run(line_config, tmp_path / "run", "report.num_shown=0")
    assert not (tmp_path / "run/shown").exists()
    assert "value" in result
    assert (tmp_path / "run/report.png").is_file()


def test_a_fine_tune_of_one_update_killed_before_its_state_goes_on(line_config, tmp_path, monkeypatch):
    whole = json.loads(json.dumps(without_times(run(line_config, tmp_path / "whole", "finetune.images=16"))))
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(records, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run(line_config, folder, "finetune.images=16")
    assert list((folder / "finetune").glob("snapshot-*"))
    assert json.loads(json.dumps(without_times(run(line_config, folder, "finetune.images=16")))) == whole


@pytest.mark.parametrize("member", [None, "another.npy"])
def test_features_under_no_name_or_another_are_made_again(line_config, tmp_path, member):
    """A whole zip, but for its table of contents: the report had lost its error bars."""
    whole = run(line_config, tmp_path / "run")
    assert all(row["error"] is not None for row in whole["rows"].values())
    for path in (tmp_path / "run/features").iterdir():
        with zipfile.ZipFile(path) as archive:
            content = archive.read(archive.namelist()[0])
        with zipfile.ZipFile(path, "w") as archive:
            if member is not None:
                archive.writestr(member, content)
    assert without_times(run(line_config, tmp_path / "run")) == without_times(whole)
