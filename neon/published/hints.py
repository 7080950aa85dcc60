"""What to do about a file that is not there: a near name in its folder, or the published file of that name."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from neon.published.table import TABLE, near_names


def how_to_get(path: Path) -> str:
    """Advice on a missing file, "" if nothing is known about it."""
    advice = []
    if (near_path := _near(path)) is not None:
        advice.append(f"did you mean {near_path}?")
    here = next((item for item in TABLE if item.name == path.name), None)
    if here is not None:
        target = here.target(Path())
        moved = "" if target.absolute() == path.absolute() else f" (it goes to {target}: name that, or move it)"
        advice.append(f"neon download {here.name}{moved}")
    elif near := near_names(path.name):
        advice.append(f"a published file is called {near[0]}: neon download {near[0]}")
    return "; ".join(advice)


def _near(path: Path) -> Path | None:
    """The path with a near name for the first part of it that is not there."""
    try:
        above = next((folder for folder in path.parents if folder.is_dir()), None)
        if above is None:
            return None
        wrong, *rest = path.relative_to(above).parts
        lower = {other.name.lower(): other for other in above.iterdir()}
        near = [lower[name] for name in get_close_matches(wrong.lower(), list(lower), n=1, cutoff=0.8)]
        return next((one for part in near for one in (part.joinpath(*rest), part) if one.exists()), None)
    except OSError:  # a folder that may not be listed, as those above the folders of other users
        return None


def need_file(path: Path, what: str) -> Path:
    """`path` if it is there. Raises FileNotFoundError that says how to get it."""
    if path.exists():
        return path
    advice = how_to_get(path)
    raise FileNotFoundError(f"{what}: there is no {path}" + (f"; {advice}" if advice else ""))
