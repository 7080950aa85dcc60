"""The floor plan of docs/architecture.md: which room may import which, and how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("neon", "edm", "var", "xar", "imm", "flow", "fid")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
MAX_LINES = 350


def test_imports_keep_to_the_floors():
    """The contracts lie in pyproject.toml; `lint-imports` prints the import that breaks one."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_only_one_module_knows_torch_distributed():
    found = {file.relative_to(ROOT).as_posix() for file in FILES if "torch.distributed" in imported(file)}
    assert found == {"neon/runtime/distributed.py"}


def test_a_file_states_one_idea_and_stays_short():
    """A longer one gives its reason in its first lines: `Long because ...`."""
    long = [file for file in FILES if len(file.read_text().splitlines()) > MAX_LINES]
    assert [file for file in long if "Long because" not in file.read_text()[:1000]] == []


def test_the_type_checker_is_overruled_rarely_and_with_a_reason():
    files = [*FILES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    mark = "# type: " + "ignore"
    lines = [line for file in files for line in file.read_text().splitlines() if mark in line]
    assert len(lines) <= 10
    assert [line for line in lines if not re.search(mark + r"\[[\w-]+\] +# \w+", line)] == []


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
