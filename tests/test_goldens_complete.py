"""Every golden file is tested by exactly one test, whatever folder $NEON_GOLDENS names."""

import importlib
import os
from pathlib import Path

import pytest

from tests import goldens

FAMILIES = ("edm", "var", "xar", "imm", "flow", "fid")

for module in sorted(Path(__file__).parent.glob("*/test_goldens*.py")):
    importlib.import_module(f"tests.{module.parent.name}.{module.stem}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_belongs_to_exactly_one_kind(family):
    files = goldens.files(family)
    assert files or "NEON_GOLDENS" in os.environ, (
        f"no golden vectors of {family} in {goldens.FOLDER}"
    )  # another folder may hold one family
    kinds = list(dict.fromkeys(goldens.KINDS.get(family, [])))
    for file in files:
        matches = [kind for kind in kinds if goldens.is_of_kind(file, *kind)]
        assert len(matches) == 1, (
            f"{family}/{file.name} matches {matches or 'no kind'}; the kinds of {family} are {kinds}"
        )
