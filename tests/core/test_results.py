"""docs/results.md is what scripts/make_results.py makes of results/, and says what the numbers say."""

import json
import shutil

import pytest
from click.testing import CliRunner

from scripts import make_results
from scripts.make_results import ROOT, main


def made(results, out):
    done = CliRunner().invoke(main, ["--results", str(results), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    return (out / "results.md").read_text()


def test_the_page_is_regenerated_to_the_byte(tmp_path):
    assert made(ROOT / "results", tmp_path) == (ROOT / "docs" / "results.md").read_text()
    plots = {file.name: file.read_bytes() for file in (tmp_path / "results").glob("*.svg")}
    assert plots == {file.name: file.read_bytes() for file in (ROOT / "docs" / "results").glob("*.svg")}


def row(w, value, second=1.0, direction="synth"):
    metrics = {"fd5k[fashion-cnn]": value, "fd5k[pixel-pca64]": second}
    return {"w": w, "cfg_scale": None, "direction": direction, "metrics": metrics}


def found(neon, controls=(30.0, 50.0, 31.0), others=(21.0, 22.0), second=0.9):
    rows = dict(zip(("base", "self-trained", "random direction"), (row(0.0, v) for v in controls), strict=True))
    rows["neon"] = row(1.0, neon, second)
    curve = [row(-1.0, 50.0), row(0.0, 30.0), row(1.0, neon), row(2.0, 40.0)]
    main_run = {"rows": rows, "w": 1.0, "cfg_scale": None, "select": {"metric": "fd5k[fashion-cnn]", "points": curve}}
    main_run |= {"step": {"relative_step": 0.005}}
    seeds = {f"seed{i}": {"rows": {"neon": row(1.0, value)}, "curve": curve} for i, value in enumerate(others, 1)}
    return {"job": "edm", "main": main_run, **seeds, "seconds": {"main": 1.0}, "device": "cpu", "not_measured": []}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"neon": 20.0}, "is below the best control (base, 30) by more than the spread (2)"),
        ({"neon": 20.0, "controls": (30.0, 50.0, 23.5)}, "is NOT below the best control (random direction, 23.5)"),
        ({"neon": 20.0, "others": (21.0,)}, "only 2 of 3 sets S was measured, so the spread is open"),
        ({"neon": 20.0, "second": 1.1}, "On pixel-pca64 Neon is WORSE than the base"),
    ],
)
def test_the_verdict_weighs_the_controls_against_the_spread(changes, expected):
    assert expected in make_results.verdict(found(**changes))


def test_a_measured_family_gets_its_section_and_its_plot(tmp_path):
    results, out = tmp_path / "results", tmp_path / "docs"
    (results / "small").mkdir(parents=True)
    for name in ("demo.json", "published.json"):
        shutil.copy(ROOT / "results" / name, results)
    (results / "small" / "edm.json").write_text(json.dumps(found(20.0) | {"not_measured": ["snapshots"]}))
    page = made(results, out)
    assert "- U-shape in w: yes; least at w = 1." in page
    assert "Not measured: snapshots." in page
    assert "Not measured yet: flow, var, xar, imm" in page
    drawn = (out / "results" / "edm_w.svg").read_text()
    assert [drawn.count(text) for text in ("<polyline", "second S", "third S")] == [3, 1, 1]
