"""What docs/merging.md says was measured is what lies in results/."""

import json

from tests.commands import ROOT


def test_the_measured_numbers_are_those_of_the_committed_result():
    found = json.loads((ROOT / "results/bench/merge_files_cpu.json").read_text())
    page = " ".join((ROOT / "docs/merging.md").read_text().split())
    best = {name: min(values) for name, values in found["seconds"].items()}
    share = {name: f"{100 * value:.0f} %" for name, value in found["share_of_cp"].items()}
    exact, coarse = found["mergekit_in_float32"], found["mergekit_in_bfloat16"]
    assert exact["difference"]["largest_in_last_places"] <= 1
    for text in (
        f"{found['bytes'] / 1e9:.2f} GB",
        f"load average {found['load_average_before']:.0f}",
        f"`cp` and sync {best['cp']:.1f} s",
        f"merge {best['merge']:.1f} s ({share['merge']} of cp's speed)",
        f"with hashes {best['merge_with_hashes']:.1f} s ({share['merge_with_hashes']})",
        f"{found['peak_mib_above_imports']:.0f} MiB above what torch's import takes",
        f"{exact['seconds']:.0f} s in float32",
        f"{coarse['seconds']:.0f} s in bfloat16",
        f"up to {coarse['difference']['largest_in_last_places']:.0f} units",
    ):
        assert text in page, text
