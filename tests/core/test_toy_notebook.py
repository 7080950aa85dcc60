"""toy_appendix.ipynb runs from a clean kernel and shows what its text says; the committed outputs are those of a run."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FILE = ROOT / "toy_appendix.ipynb"
PUBLISHED_BASE = {"diffusion": 0.162, "ar": 0.099}  # of the authors' notebook
MEASURE = """
import json, time
def summary(curves):
    numbers = lambda curve: [curve.best_w().mean().item(), curve.at(0), curve.lowest(), curve.at(-1)]
    return {budget: {knob: numbers(curve) for knob, curve in row.items()} for budget, row in curves.items()}
print(json.dumps({"diffusion": summary(diffusion_curves), "ar": summary(ar_curves),
    "control": [control_curve.mean.min().item(), ar_control.mean.min().item()],
    "cosines": {"diffusion": [zetas, diffusion_cosines.mean(1).tolist()], "ar": [taus, ar_cosines.mean(1).tolist()]},
    "plane": [values.min().item(), values[w_o.abs().argmin(), w_s.abs().argmin()].item()],
    "warm_up": [excess[0].mean().item(), excess.mean(1).min().item()],
    "seconds": time.process_time()}))
"""
SAMPLERS = {
    "diffusion": {"mode": ("1.0", "1.1"), "diversity": ("0.9",), "strongest": "1.1"},
    "ar": {"mode": ("0.5", "0.85"), "diversity": ("1.6",), "strongest": "0.5"},
}


@pytest.fixture(scope="module")
def run() -> dict:
    """Numbers of a run in a clean kernel of this interpreter, whatever kernels are registered; one thread."""
    notebook = nbformat.read(FILE, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    specs = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs, transport="ipc")
    client = NotebookClient(notebook, km=manager, timeout=3600, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(notebook.cells[-1].outputs[0].text)


def rows(run: dict, family: str, kind: str) -> list[list[float]]:
    """[w*, FD at 0, lowest FD, FD at -1] of both budgets and every sampler of a kind."""
    return [by_knob[knob] for by_knob in run[family].values() for knob in SAMPLERS[family][kind]]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusion", "ar"])
def test_the_sign_of_w_follows_from_the_sampler(run, family):
    assert all(w > 0 for w, *_ in rows(run, family, "mode"))
    assert all(w < 0 for w, *_ in rows(run, family, "diversity"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "gain"), [("diffusion", 2.0), ("ar", 1.3)])
def test_neon_improves_on_the_base(run, family, gain):
    for _, base, lowest, _ in rows(run, family, "mode") + rows(run, family, "diversity"):
        assert base / lowest >= gain
        assert PUBLISHED_BASE[family] / 3 <= base <= PUBLISHED_BASE[family] * 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusion", "ar"])
def test_training_on_ones_own_samples_makes_it_worse(run, family):
    strongest = SAMPLERS[family]["strongest"]
    _, base, _, self_trained = run[family]["50"][strongest]
    assert self_trained > 1.3 * base


@pytest.mark.slow
def test_five_times_the_budget_needs_a_smaller_w(run):
    for zeta in ("0.9", "1.1"):
        short, long = (abs(run["diffusion"][budget][zeta][0]) for budget in ("50", "250"))
        assert 2.5 <= short / long <= 6


@pytest.mark.slow
@pytest.mark.parametrize(("family", "index"), [("diffusion", 0), ("ar", 1)])
def test_a_random_direction_does_not_help(run, family, index):
    base, lowest = run[family]["50"][SAMPLERS[family]["strongest"]][1:3]
    assert base - run["control"][index] < 0.2 * (base - lowest)


@pytest.mark.slow
def test_the_gradients_are_anti_aligned_for_mode_seeking_samplers(run):
    zetas, cosines = run["cosines"]["diffusion"]
    assert all(cosine < 0 for zeta, cosine in zip(zetas, cosines, strict=True) if zeta >= 0.999)
    assert all(cosine > 0 for zeta, cosine in zip(zetas, cosines, strict=True) if zeta < 0.93)
    taus, cosines = run["cosines"]["ar"]
    assert all(cosine < 0 for tau, cosine in zip(taus, cosines, strict=True) if tau < 0.99)
    assert all(cosine > 0 for tau, cosine in zip(taus, cosines, strict=True) if tau > 1.01)


@pytest.mark.slow
def test_plane_and_warm_up_have_their_minimum_away_from_the_base(run):
    lowest, base = run["plane"]
    assert lowest < base / 2
    start, best = run["warm_up"]
    assert best < start


@pytest.mark.slow
def test_it_takes_at_most_four_minutes(run):
    """Processor time of one thread, so that a busy machine does not count."""
    assert run["seconds"] <= 240


def test_every_cell_is_introduced_and_short():
    cells = nbformat.read(FILE, as_version=4).cells
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell.cell_type == "code":
            assert before is not None
            assert before.cell_type == "markdown"
            assert len(cell.source.splitlines()) <= 15
            assert "def " not in cell.source


def test_committed_outputs_are_those_of_one_clean_run():
    assert FILE.stat().st_size < 2_000_000
    code = [cell for cell in nbformat.read(FILE, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    shows_figure = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    assert shows_figure == ["figures." in cell.source for cell in code]
