"""The published files that this project reads: the rows of table.toml, found by name, group or address."""

from __future__ import annotations

import tomllib
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fid.inception import WEIGHTS
from fid.weights import cache_folder

GROUPS = ("models", "refs", "bases")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file that others publish; table.toml says what the fields mean."""

    name: str
    group: str
    source: str
    folder: str = "checkpoints"
    sha256: str = ""

    def target(self, root: Path) -> Path:
        return root / self.folder / self.name


def _read() -> tuple[Published, ...]:
    table = tomllib.loads(Path(__file__).with_name("table.toml").read_text(encoding="utf-8"))
    inception = Published(
        name=WEIGHTS.files[0],
        group="refs",
        source=WEIGHTS.url,
        folder=str(cache_folder()),
        sha256=WEIGHTS.sha256_prefix,
    )
    return (*(Published(group=group, **row) for group in GROUPS for row in table[group]), inception)


TABLE = _read()


def select(names: Sequence[str], groups: Sequence[str]) -> list[Published]:
    """The table's rows of these names (with or without suffix) and groups; an https address is a row of its own.

    Raises ValueError for a name that is not there.
    """
    chosen = [item for item in TABLE if item.group in groups]
    for name in names:
        found = [item for item in TABLE if name in (item.name, Path(item.name).stem, item.source)]
        if not found and name.startswith("https://"):
            found = [Published(name=Path(urllib.parse.urlsplit(name).path).name, group="", source=name)]
        if not found:
            near = near_names(name)
            raise ValueError(
                f"no published file {name!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
                + " (neon download --list)"
            )
        chosen += [item for item in found if item not in chosen]
    return chosen


def near_names(name: str) -> list[str]:
    """Names of the table that look like this one, the nearest first; case and suffix do not count for much."""
    stems = {Path(item.name).stem.lower(): item.name for item in TABLE}
    return [stems[stem] for stem in get_close_matches(Path(name).stem.lower(), list(stems), n=3, cutoff=0.6)]
