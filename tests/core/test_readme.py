"""Every number of the README is that of the file which it names; every command of the README and of docs/ is one that
the command line knows."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from neon.cli.main import main
from neon.published.table import select
from tests.commands import ROOT

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


# Numbers


def row(steps: str, run: dict) -> str:
    """A row of the demo's table, as it follows from results/demo.json."""
    fd, pca = "fd2k[fashion-cnn]", "fd2k[pixel-pca64]"

    def cell(name: str) -> str:
        return f"{run['rows'][name]['metrics'][fd]:.1f}" if name in run["rows"] else "-"

    base, neon = run["rows"]["base"]["metrics"], run["rows"]["neon"]["metrics"]
    change = f"{100 * (neon[fd] / base[fd] - 1):.0f} %"
    cells = [steps, run["synth_seed"], f"{run['w']:g}", cell("base"), cell("self-trained"), cell("random direction")]
    cells += [f"**{cell('neon')}**", change, f"{base[pca]:.2f} -> {neon[pca]:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def test_the_demos_table_is_its_result():
    found = result("demo.json")
    rows = [row(steps, run) for steps, runs in found["steps"].items() for run in runs]
    table = README.split("## What the demo measured")[1].split("##")[0]
    assert re.findall(r"^\| \d.*", table, re.M) == rows
    assert f"made by `{found['command']}` (commit {found['commit'][:9]}, {found['machine']}" in README
    real = found["real_against_real"]
    assert f"2,000 real images score\n{real['fd2k[fashion-cnn]']:.2f} ({real['fd2k[pixel-pca64]']:.2f} on" in README
    images = {run["select"]["images"] for runs in found["steps"].values() for run in runs}
    assert f"w was found by the search on other noise ({' or '.join(f'{n:,}' for n in sorted(images))} images" in README


def test_the_caption_says_how_the_figure_was_made():
    """docs/demo.png is the first run of results/demo.json."""
    found = result("demo.json")
    first = found["steps"]["8"][0]
    caption = README.split("](docs/demo.png)")[1].split("\n\n")[1].replace("\n", " ")
    assert f"`{found['command']}`" in caption
    assert f"w found with {first['select']['images']:,} images" in caption
    assert "2,000 images of held-out noise" in caption


def test_the_published_numbers_are_those_of_the_reproductions():
    said = {}
    for script in (ROOT / "scripts/reproduce").glob("[!_]*.sh"):
        found = re.search(r"published FID (\S+) -> (\S+)", script.read_text())
        if found:
            said[script.stem] = found.groups()
    table = README.split("## Published results")[1].split("##")[0]
    rows = re.findall(r"\| (\S+) \| (\S+) \| `configs/(\w+)\.toml` \|", table)
    assert {name: (base, neon) for base, neon, name in rows} == said


def test_the_table_of_pairs_is_its_file():
    rows = []
    for case, row in result("bench/paired_cpu.json")["cases"].items():
        what, _, other = case.partition(", before = ")
        before = f"{row['before_cpu_s']:.2f} s" + (f" ({other})" if other else "")
        ratio = row["times_before_by_cpu_s"]["median"]
        rows.append(f"| {what.replace('_', ' ')} | {before} | {row['after_cpu_s']:.2f} s | {ratio:.2f} |")
    text = (ROOT / "docs" / "speed.md").read_text()
    assert re.findall(r"^\| (?!what|---).*", text, re.M) == rows


FAMILIES = {
    "edm": "EDM", "edm-again": "EDM, everything seeded anew", "flow": "flow matching", "var": "VAR", "xar": "xAR",
    "imm": "IMM",
}  # fmt: skip


def number(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def test_the_table_of_the_families_is_their_measurements():
    text = README.split("## Every family, on real images")[1].split("## ")[0]
    said = re.findall(r"^\| (?!family|---).*", text, re.M)
    made, best_on_real, fd = [], {}, "fd5k[fashion-cnn]"
    for job, label in FAMILIES.items():
        found = result(f"small/{job}.json")
        rows = {name: row["metrics"] for name, row in found["main"]["rows"].items()}
        others = [found[seed]["rows"]["neon"]["metrics"] for seed in ("seed1", "seed2") if seed in found]
        values = [row[fd] for row in (rows["neon"], *others)]
        neon = ", ".join(map(number, values))
        is_clear = rows["base"][fd] - max(values) > max(values) - min(values)
        neon = f"**{neon}**" if is_clear else neon
        neon += "" if others else " (one set S)"
        before, after = (rows[name]["recall5k[fashion-cnn,k=5]"] for name in ("base", "neon"))
        cells = [label, *(number(rows[name][fd]) for name in ("base", "self-trained", "random direction")), neon]
        made.append(f"| {' | '.join(cells)} | {before:.2f} -> {after:.2f} |")
        if "real_data" in found:
            best_on_real[job] = found["real_data"]["w"]
    assert said == made
    assert best_on_real == {"flow": 0, "var": 0, "edm": -0.5, "imm": -0.5}
    assert "its best w is 0 for flow and VAR, and -0.5 for EDM and IMM" in text
    assert {result(f"small/{job}.json")["commit"][:7] for job in ("edm", "flow", "var", "imm")} == {"d7c75f9"}
    assert "(commit d7c75f9)" in text
    edm, xar = result("small/edm.json"), result("small/xar.json")
    base, neon = (edm["main"]["rows"][name]["metrics"]["fd5k[pixel-pca64]"] for name in ("base", "neon"))
    assert f"is worse than its base ({number(neon)} against {number(base)})" in text
    assert f"recognised in {100 * xar['base']['recognised']:.0f} % of the images" in text


def test_the_table_of_the_card_is_its_measurement():
    found = result("bench/gpu_h200.json")
    rows = found["rows"]
    table = README.split("On one NVIDIA H200")[1].split("## ")[0]
    for job, label in {"imm_xl": "IMM DiT-XL/2, one guided step, tf32", "var_d16": "VAR-d16, guided, fp16"}.items():
        plain, exact, compiled, fast = (
            f"{rows[f'{job}/{mode}']['images_per_s']['median']:.0f}" for mode in ("plain", "exact", "compiled", "fast")
        )
        cost = f"{100 * rows[f'{job}/fast']['error']:.1f} %" if job == "imm_xl" else "other tokens"
        assert rows[f"{job}/exact"]["equals_plain"]
        assert f"| {label} | {plain} | {exact}, equal bit for bit | {compiled} | {fast}, {cost} |" in table
        assert not found["goals"][job]["2x_at_published_precision"]
    assert f"which is of {found['header']['commit'][:7]}" in table
    shared = result("bench/gpu_h200_shared.json")["rows"]
    assert all(row["equals_plain"] for name, row in shared.items() if name.endswith("/exact"))


def test_the_table_of_graphs_is_its_measurement():
    sections = result("bench/gpu_h200_graphs.json")["sections"]
    labels = {
        "xar": "xAR-B, 5 steps per cell, guided, fp16, batch 16",
        "var": "VAR-d16, guided, fp16, batch 32",
    }
    for name, label in labels.items():
        found = sections[name]
        shares = found["equality (share of numbers that differ from the second call without graphs)"]
        to_the_published = [value for key, value in shares.items() if key.endswith("to weights cast at every call")]
        assert len(to_the_published) == 12
        assert not any(value if isinstance(value, float) else any(value) for value in to_the_published)
        off, on = (f"{found[mode]['images_per_s']:.0f}" for mode in ("off", "on"))
        peak = " -> ".join(f"{found[f'peak_mib_{mode}']:,.0f}" for mode in ("off", "on"))
        assert f"| {label} | {off} | {on}, equal bit for bit | {peak} |" in README


def test_what_docs_say_of_graphs_and_training_on_a_gpu_is_the_measurement():
    sections = result("bench/gpu_h200_graphs.json")["sections"]
    text = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    for name in ("xar", "var"):
        off, on = (sections[name][mode] for mode in ("off", "on"))
        assert f"{off['ms']:.0f} ms without graphs, {on['ms']:.0f} with" in text
        assert f"the GPU then idles for {100 * on['idle_share']:.0f} %" in text
    edm, var = sections["edm/train"], sections["var/train"]
    ms = {key: f"{row['ms']:.0f}" for key, row in edm.items() if isinstance(row, dict)}
    assert f"{ms['now']} ms per step, fused Adam {ms['fused']}, one read per step {ms['read_once']}" in text
    assert f"all of it {ms['fused+next']}" in text
    assert f"micro-batches of a quarter {ms['micro4']}, with one read {ms['micro4_read_once']}" in text
    now, fused, every = (var[key] for key in ("now", "fused", "fused+next"))
    assert (
        f"{now['least_ms']:.0f} to {now['ms']:.0f} ms, fused Adam {fused['ms']:.0f}, all of it {every['ms']:.0f}"
        in text
    )
    assert f"{100 * var['fused']['weights_that_differ']:.0f} % of the weights" in text


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def speeds() -> Iterator[str]:
    """The rows of the table of speeds, as they follow from results/bench/."""
    demo, cifar = result("bench/edm_demo_cpu.json")["modes"], result("bench/edm_cifar10_cpu.json")["modes"]
    exact, other = demo
    fd = [mode["metric"]["fd1k[fashion-cnn]"] for mode in demo]
    a, b = exact["sampling"], other["sampling"]
    yield (
        f"| {a['images_per_s']:.1f} ({share(a['share_of_matmul_rate'])} of the matmul rate) | channels_last: "
        f"{b['images_per_s']:.1f} ({share(b['share_of_matmul_rate'])}) | fd1k {fd[0]:.4f} -> {fd[1]:.4f} |"
    )
    for modes, stage, digits in ((demo, "finetune", 0), (cifar, "sampling", 3), (cifar, "finetune", 2)):
        a, b = (mode[stage] for mode in modes)
        yield (
            f"| {a['images_per_s']:.{digits}f} ({share(a['share_of_matmul_rate'])}) | channels_last: "
            f"{b['images_per_s']:.{digits}f} ({share(b['share_of_matmul_rate'])}) |"
        )
    var = result("bench/var_d16_cpu.json")
    fp32, bf16 = ([r for r in var["rows"] if r["precision"] == kind] for kind in ("fp32", "bf16"))
    rates, fast_rates = (" / ".join(f"{r['images_per_s']:.3f}" for r in rows) for rows in (fp32, bf16))
    shares = " / ".join(f"{100 * r['share_of_fp32_matmul_rate']:.0f}" for r in fp32)
    mode = var["fast_mode"]
    yield (
        f"| {rates} ({shares} %) | bf16: {fast_rates} | largest logit difference "
        f"{mode['largest_logit_difference']:.2f} at a spread of {mode['logit_std']:.0f} |"
    )
    yield f"| {var['plain_seconds_per_image']:.1f} s, ours {fp32[0]['seconds']:.1f} s |"
    xar = result("bench/xar_base_cpu.json")
    exact, fast = xar["rows"]
    yield (
        f"| {exact['images_per_s']:.3f} ({share(exact['share_of_fp32_matmul_rate'])}) | bf16: "
        f"{fast['images_per_s']:.3f} | {100 * xar['fast_mode_relative_error']:.1f} % of"
    )
    for r in result("bench/imm_cpu.json")["rows"]:
        if r["steps"] in (1, 8):
            exact, fast = r["exact_fp32"], r["fast_bf16"]
            yield (
                f"| {exact['images_per_s']:.3f} ({share(exact['share_of_matmul_rate'])}) | bf16: "
                f"{fast['images_per_s']:.3f} | {100 * fast['relative_error']:.1f} % |"
            )
    merge = result("bench/merge_cpu.json")
    yield f"| {merge['resident']['gb_per_s']:.1f} GB/s, {merge['speedup']:.1f} times the plain way |"
    frechet = result("bench/frechet_cpu.json")
    f, n = frechet["frechet"], frechet["neighbours"]
    yield (
        f"| {f['frechet_s']:.1f} s; {f['frechet_cached_reference_s']:.2f} s against a reference that was used before "
        f"| | scipy's sqrtm: {f['scipy_sqrtm_s']:.1f} s |"
    )
    yield (
        f"| {n['seconds']:.0f} s, {n['peak_beyond_features_mib'] / 1024:.1f} GiB at a budget of "
        f"{n['budget_mib'] / 1024:.0f} GiB |"
    )


@pytest.mark.parametrize("line", list(speeds()))
def test_a_row_of_the_speeds_is_its_measurement(line):
    assert line in README


# Commands


def commands(path: Path) -> Iterator[str]:
    """Every line of a code block and every `...` in the text that starts one of this project's commands."""
    text = path.read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [block for language, block in fenced if language in ("", "bash", "sh", "console")]
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        for part in re.split(r"&&|;|\|", re.split(r"\s#\s|\s{2,}#", line)[0]):
            found = re.search(r"(?:^|\s)(neon|-m neon|(?:edm|var|xar|imm|flow)/calculate_fid\.py)\s(.*)", part.strip())
            if found and "..." not in part and "|" not in part:
                yield f"{found[1].removeprefix('-m ')} {found[2]}".strip()


ALL = sorted({(path.name, command) for path in [*DOCUMENTS, *TEMPLATES] for command in commands(path)})


def parsed(words: list[str]) -> None:
    """Raises click.UsageError for a command or option that is not there."""
    if words[0].endswith("calculate_fid.py"):
        command = importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main
    else:
        command = main
        words = ["neon", *words[1:]]
    context = click.Context(command, info_name=words[0])
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        context = click.Context(command, parent=context, info_name=command.name)
    try:
        command.make_parser(context).parse_args(list(rest))
    except click.BadOptionUsage as error:  # `neon data --size`, in a sentence, names an option without a value
        if rest[-1] != error.option_name:
            raise


def test_there_are_commands_to_check():
    names = {name for name, _ in ALL}
    assert {"README.md", "own_model.md", "evaluator.md"} <= names
    assert len(ALL) > 25


@pytest.mark.parametrize(("name", "command"), ALL, ids=lambda value: value if value.endswith(".md") else None)
def test_a_documented_command_exists_with_its_options(name, command):
    parsed(shlex.split(command))


def test_a_wrong_option_or_verb_would_be_seen():
    for command in (
        "neon run CONFIG --nothing",
        "neon grid CONFIG",
        "neon fid info FILE",
        "edm/calculate_fid.py --x 1",
    ):
        with pytest.raises(click.UsageError):
            parsed(shlex.split(command))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_files_that_a_document_names_are_there(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []
    named = set(re.findall(r"(?<![\w/.-])((?:configs|scripts|docs|results|demo)/[\w./-]+\.\w+)", text))
    named = {name for name in named if not Path(name).stem.isupper()}  # ROW.sh stands for any
    assert [n for n in sorted(named) if not (ROOT / n).exists() and not (path.parent / n).exists()] == []
    for line in re.findall(r"download_models\.sh([^`#\n]*)", text):
        select([word for word in shlex.split(line) if not word.startswith("--")], [])
