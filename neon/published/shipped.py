"""Files that travel with the project: beside the packages in a checkout, inside neon/ in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: Literal["configs", "demo"]) -> Path:
    """configs: of the published rows and of the demo. demo: a small set, a base trained on it, references.

    Raises FileNotFoundError if the installation lacks it.
    """
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation lacks {name}/, neither in {PACKAGE} nor beside it: install it again")
