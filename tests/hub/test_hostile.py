"""Broken and hostile inputs of `neon merge` in the Hub's layouts: every one ends in one line that names what is wrong,
changes no file, leaves none behind, and runs nothing."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from neon.cli.main import main
from tests.core.test_files import no_file_longer_than
from tests.hub.bad_inputs import (
    ADAPTER,
    FIRST,
    INDEX,
    KOHYA,
    ONE,
    RUN_ME,
    SECOND,
    Payload,
    adapted,
    distributed,
    entry,
    files,
    indexed,
    metadata_of,
    no_folder,
    piece,
    pipeline,
    recursive,
    replaced,
    save,
    shard_named,
    shard_of,
    sharded,
    state,
    table,
    there_already,
    unet,
    write_index,
)
from tests.watching import RUNS, watched

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EVENTS = RUNS - {"os.mkdir"}  # the temporary folder of the output
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
PLAIN = {name: value for name, value in KOHYA.items() if "alpha" not in name}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
GLOBAL = b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c" + bytes([len(RUN_ME)]) + RUN_ME.encode() + b"\x85R."

CASES: dict[str, tuple[Callable[[Path], list], str]] = {
    # an index and its shards
    "a shard is missing": (indexed(lambda base: (base / SECOND).unlink()), "no checkpoint .*00002-of-00002"),
    "a shard outside": (shard_named("../../etc/passwd"), "shard ../../etc/passwd is not a plain file name"),
    "a shard at the root": (shard_named("/etc/passwd"), "shard /etc/passwd is not a plain file name"),
    "a shard by backslashes": (shard_named("..\\secret"), "not a plain file name"),
    "a hidden shard": (shard_named(".ssh"), "not a plain file name"),
    "a shard with a NUL": (shard_named("a\0b"), "not a plain file name"),
    "a shard's name too long": (shard_named("x" * 300), "not a plain file name"),
    "a shard that is a number": (shard_named(7), "not an index of shards"),
    "a shard that is a list": (shard_named([FIRST]), "not an index of shards"),
    "a shard that is the index": (shard_named(INDEX), "index"),
    "a shard that is a folder": (replaced(Path.mkdir), "it is a folder"),
    "a shard that is a pipe": (replaced(os.mkfifo), "no checkpoint"),
    "a shard that is a loop of links": (replaced(lambda path: path.symlink_to(path)), "no checkpoint"),
    "a shard that is a broken link": (replaced(lambda path: path.symlink_to("../blobs/0")), "no checkpoint"),
    "a tensor that no shard holds": (
        indexed(lambda base: write_index(base, {"a.weight": FIRST, "b.weight": SECOND, "c": FIRST})),
        "1 of 3 tensors are not in the shards .*first: c",
    ),
    "a tensor that the index leaves out": (
        indexed(lambda base: save(base / FIRST, {"a.weight": ONE, "c": ONE})),
        "1 tensors lie in shards .*first: c",
    ),
    "a tensor in two shards": (
        indexed(lambda base: save(base / SECOND, {**state(1.0)})), "1 tensors lie in shards .*first: a.weight"
    ),
    "a name twice in the index": (
        indexed(lambda base: (base / INDEX).write_text('{"weight_map": {"a.weight": "1", "a.weight": "2"}}')),
        "a name comes twice",
    ),
    "no weight_map": (indexed(lambda base: (base / INDEX).write_text("{}")), "no weight_map"),
    "an empty weight_map": (indexed(lambda base: write_index(base, {})), "names no"),
    "a weight_map that is a list": (indexed(lambda base: write_index(base, [FIRST])), "no weight_map"),
    "an index that is no JSON": (indexed(lambda base: (base / INDEX).write_text("{")), "JSON"),
    "an index 100,000 deep": (indexed(lambda base: (base / INDEX).write_text('{"a":' + "[" * 100_000)), "JSON"),
    "an empty shard": (shard_of(b""), f"shard {FIRST}: the file is empty"),
    "a pointer of Git LFS": (shard_of(LFS), "Git LFS pointer"),
    "a web page": (shard_of(b"<!DOCTYPE html><html>not found</html>" * 9), "an HTML page"),
    "a pickle as a shard": (shard_of(pickle.dumps(Payload(), 2)), "'(builtins|__builtin__).exec'"),
    "a truncated shard": (shard_of(entry()[:-1]), "ends|truncated|beyond|outside"),
    "an unknown dtype": (shard_of(entry(dtype="BF17")), "has dtype BF17"),
    "a shape of 2^62": (shard_of(entry(shape=[2**62, 2**62])), "more numbers than any"),
    "negative offsets": (shard_of(entry(data_offsets=[-16, 0])), "expected"),
    "an endless header": (shard_of(struct.pack("<Q", 2**60) + b"{}" * 50), f"shard {FIRST}: not a checkpoint"),
    "another shape in one model": (shard_of(entry(shape=[4])), r"a\.weight: the base has shape \[4\]"),
    # folders
    "another component missing": (pipeline(lambda synth: unet(synth).unlink()), "has no weights in unet"),
    "no weights at all": (indexed(lambda base: [path.unlink() for path in base.iterdir()]), "no weights that"),
    "no such variant": (pipeline(lambda synth: None, "--variant", "fp16"), "no file of variant 'fp16'"),
    "variants that differ in names": (
        pipeline(lambda synth: save(unet(synth), {"a.weight": ONE, "c": ONE})), "hold different entries.*b.weight, c"
    ),
    "a component of NaN": (
        pipeline(lambda synth: save(unet(synth), {**state(2.0), "b.weight": torch.full((3,), torch.nan)})),
        r"b\.weight: differs .* not finite",
    ),
    "a component of integers": (
        pipeline(lambda synth: save(unet(synth), {name: value.long() for name, value in state(2.0).items()})),
        r"is torch\.float32 in the base and torch\.int64",
    ),
    "a component that links to itself": (
        pipeline(lambda synth: (unet(synth).unlink(), unet(synth).symlink_to(unet(synth)))), "no checkpoint"
    ),
    "a folder and a file": (
        lambda tmp: [sharded(tmp / "base", 1.0), save(tmp / "s.safetensors", state(2.0)), "--out", tmp / "new"],
        "is a folder and .* is not",
    ),
    "an output that is there": (there_already, "is there already"),
    "an output in no folder": (no_folder, "no folder"),
    # torch.distributed.checkpoint
    "a table that runs os.system": (metadata_of(b"\x80\x02cos\nsystem\n(U\x05touchtR."), "'os.system'"),
    "a table that runs exec": (metadata_of(GLOBAL), "'builtins.exec'"),
    "a table that reduces": (metadata_of(pickle.dumps(Payload())), "'builtins.exec'"),
    "an empty table": (metadata_of(b""), "the file is empty"),
    "a table of text": (metadata_of(b"hello\n" * 20), r"\.metadata"),
    "pieces outside": (table(lambda held: setattr(piece(held), "relative_path", "../x")), "not a plain file name"),
    "pieces at the root": (
        table(lambda held: setattr(piece(held), "relative_path", "/etc/passwd")), "not a plain file name"
    ),
    "a piece that is too long": (table(lambda held: setattr(piece(held), "length", 10**12)), "a piece ends at byte"),
    "a piece at a negative place": (table(lambda held: setattr(piece(held), "offset", -1)), "the offset of a piece"),
    "the pieces' file is missing": (distributed(lambda folder: next(folder.glob("*.distcp")).unlink()), "distcp"),
    "pieces that run something": (
        distributed(lambda folder: next(folder.glob("*.distcp")).write_bytes(pickle.dumps(Payload()) * 400)), "zip"
    ),
    # PEFT
    "no config beside it": (adapted(ADAPTER), "adapter_config.json must lie beside it"),
    "a config that is no JSON": (adapted(ADAPTER, "{r: 2"), "JSON"),
    "a config that is a list": (adapted(ADAPTER, []), "JSON object"),
    "no alpha": (adapted(ADAPTER, {"peft_type": "LORA", "r": 2}), "alpha None, expected a number"),
    "alpha NaN": (adapted(ADAPTER, {**PEFT, "lora_alpha": float("nan")}), "alpha nan, expected a number"),
    "alpha infinite": (adapted(ADAPTER, '{"lora_alpha": 1e999}'), "alpha inf, expected a number"),
    "alpha true": (adapted(ADAPTER, {**PEFT, "lora_alpha": True}), "alpha True, expected a number"),
    "another rank": (adapted(ADAPTER, {**PEFT, "r": 8}), "rank 2, .*r = 8"),
    "rank zero": (
        adapted({name: value[:0] if "_A" in name else value[:, :0] for name, value in ADAPTER.items()}, PEFT),
        "do not fit each other|rank 0",
    ),
    "patterns that are a list": (adapted(ADAPTER, {**PEFT, "alpha_pattern": ["a"]}), "expected a table of patterns"),
    "ranks that are a list": (adapted(ADAPTER, {**PEFT, "rank_pattern": [2]}), "expected a table of patterns"),
    "a slow regular expression": (adapted(ADAPTER, {**PEFT, "alpha_pattern": {"(a+)+$": 1}}), "regular expression"),
    "another method": (adapted(ADAPTER, {**PEFT, "peft_type": "LOHA"}), "no plain LoRA"),
    "an update of another shape": (
        adapted({**ADAPTER, "base_model.model.a.lora_A.weight": torch.ones(2, 9)}, PEFT, "--lora", "full"),
        "does not fit a weight of shape",
    ),
    "a module that is not there": (
        adapted({name.replace(".a.", ".z."): value for name, value in ADAPTER.items()}, PEFT, "--lora", "full"),
        "1 modules .* are in no network",
    ),
    "factors of NaN": (adapted({**ADAPTER, "base_model.model.a.lora_B.weight": ONE * torch.nan}, PEFT), "not finite"),
    "factors of integers": (adapted({name: value.int() for name, value in ADAPTER.items()}, PEFT), "int32"),
    "a tensor that the base lacks": (adapted({**ADAPTER, "base_model.model.z.bias": ONE[0]}, PEFT), "has no z.bias"),
    # kohya and diffusers' LoRA
    "an alpha of several numbers": (adapted({**KOHYA, "lora_unet_a.alpha": torch.ones(2)}), "alpha .*a number"),
    "an alpha of no number": (adapted({**KOHYA, "lora_unet_a.alpha": torch.ones(0)}), "alpha .*expected a number"),
    "an alpha NaN": (adapted({**KOHYA, "lora_unet_a.alpha": torch.tensor(torch.nan)}), "alpha nan"),
    "an alpha without factors": (adapted({**KOHYA, "lora_unet_z.alpha": torch.tensor(1.0)}), "no LoRA factor"),
    "one factor of two": (adapted({"lora_unet_a.lora_down.weight": ONE}), "only one of their two factors"),
    "a Tucker core": (adapted({**KOHYA, "lora_unet_a.lora_mid.weight": ONE}), "not supported"),
    "factors that do not fit": (
        adapted({**KOHYA, "lora_unet_a.lora_up.weight": torch.ones(2, 5)}), "do not fit each other"
    ),
    "a module with odd letters": (
        adapted({name.replace("_a.", "_../a \\."): value for name, value in KOHYA.items()}, None, "--lora", "full"),
        "1 modules .* are in no network",
    ),
    "metadata of a LoRA that is no JSON": (
        adapted(PLAIN, None, metadata={"lora_adapter_metadata": "[" * 10_000}), "lora_adapter_metadata"
    ),
    # Lightning, DeepSpeed and other containers
    "a checkpoint that runs something": (files({"state_dict": state(1.0), "callbacks": Payload()}, state(2.0)), "exec"),
    "an old checkpoint that runs something": (files(pickle.dumps({"state_dict": Payload()}, 2), state(2.0)), "exec"),
    "hyper-parameters that run something": (
        files({"state_dict": state(1.0), "hyper_parameters": {"x": Payload()}}, state(2.0), suffix=".ckpt"), "exec"
    ),
    "a state dict that is a list": (files({"state_dict": [1, 2]}, state(2.0)), "no weights found"),
    "an empty state dict": (files({"state_dict": {}}, state(2.0)), "no weights found"),
    "DeepSpeed without its module": (files({"module": None, "optimizer": {"w": ONE}}, state(2.0)), "no weights found"),
    "a container in itself": (files(recursive(), state(2.0)), "contains itself|no weights found|unfolds"),
    "two models, no name": (files({"unet": state(1.0), "vae": state(1.0)}, state(2.0)), "more than one set of weights"),
    "a set that is not there": (
        files({"unet": state(1.0), "vae": state(1.0)}, state(2.0), "--base-weights", "text"), "no 'text' weights"
    ),
    "a truncated archive": (files(b"PK\x03\x04" + bytes(60), state(2.0)), r"base\.pt"),
    "w that is no number": (files(state(1.0), state(2.0), "--w", "nan"), "nan"),
    "an output of another kind": (files(state(1.0), state(2.0), "--out", "out.pth"), r"ending in \.safetensors"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, object]:
    """Everything below a folder: of links where they point, of files their bytes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        held = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = held
    return found


def invoke(arguments: list) -> tuple[int, str]:
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(main, ["merge", *words, *([] if "--w" in words else ["--w", "1"])])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception  # no traceback
    return result.exit_code, result.stderr


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Good inputs of every layout are merged: what is imported once is imported before anyone watches."""
    unchanged = (
        indexed(lambda _: None),
        distributed(lambda _: None),
        pipeline(lambda _: None),
        files(state(1.0), state(2.0)),
        adapted(ADAPTER, PEFT),
        adapted(KOHYA, None, "--lora", "full"),
    )
    for number, make in enumerate(unchanged):
        code, message = invoke(make(tmp_path_factory.mktemp(str(number))))
        assert code == 0, message
    invoke(["base", "synth", "--w", "nan"])


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_one_line_and_changes_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    arguments = make(tmp_path)
    before = contents(tmp_path)
    with watched(EVENTS):
        code, said = invoke(arguments)
    assert code != 0
    assert contents(tmp_path) == before
    lines = [line for line in said.splitlines() if not line.startswith(("Usage:", "Try ", "warning:")) and line]
    assert len(lines) == 1, said
    assert len(said) < 2000
    assert re.search(message, said, re.DOTALL), said


@pytest.mark.parametrize("make", [indexed(lambda _: None), files(state(1.0), state(2.0))], ids=["folder", "file"])
def test_a_full_disk_is_one_line_and_leaves_the_old_output(tmp_path: Path, make: Callable[[Path], list]) -> None:
    arguments = make(tmp_path)
    before = contents(tmp_path)
    with no_file_longer_than(90):
        code, said = invoke(arguments)
    assert code == 1
    assert contents(tmp_path) == before
    assert re.fullmatch(r"Error: .*File too large.*\n", said), said
