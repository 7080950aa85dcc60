"""Progress bars: on rank 0, on stderr, and only where somebody is looking."""

from __future__ import annotations

import sys

from tqdm import tqdm

from neon.runtime.distributed import World


def progress(*, total: int, desc: str, unit: str, world: World, initial: int = 0) -> tqdm:
    """A bar over `total` units; silent on other ranks and when stderr is not a terminal."""
    is_visible = world.is_main and sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=min(initial, total),
        desc=desc,
        unit=unit,
        disable=not is_visible,
        dynamic_ncols=True,
        leave=False,
    )


def say(world: World, text: str) -> None:
    """One line for the person who waits, on stderr, from rank 0."""
    if world.is_main:
        tqdm.write(text, file=sys.stderr)
