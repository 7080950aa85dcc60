"""Networks built from arguments that lie in a file: bounded in size and time, and a refusal names the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.nn.modules import module as registration

from neon.checkpoints.limits import Budget, clean, shown
from neon.config_table import to_plain

PER_TENSOR, SPARE = 4, 1000
"""Modules and parameters of a network, against the tensors of its file: the shipped families have at most 2.2."""
MAX_NUMBER = 1_000_000
MAX_ENTRIES = 10_000


@contextmanager
def bounded(num_tensors: int) -> Iterator[None]:
    """Raises ValueError once a network that is built in the block has more parts than a file of that many tensors can
    fill."""
    budget = Budget(PER_TENSOR * num_tensors + SPARE, f"modules and parameters for a file of {num_tensors} tensors")

    def count(*_: object) -> None:
        budget.spend()

    hooks = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def building(path: Path, arch: object, num_tensors: int) -> Iterator[None]:
    """Build one of our own networks from `arch`. Whatever goes wrong is the file's: a ValueError that names it."""
    try:
        check_numbers(to_plain(arch), "arch")
        with bounded(num_tensors):
            yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError, AttributeError, MemoryError) as error:
        what = clean(str(error).partition("\n")[0], 500) or type(error).__name__
        raise ValueError(f"{path}: its arguments (arch) make no network: {what}") from error


def check_numbers(value: object, where: str) -> None:
    """Raises ValueError for a size that no network has, and for lists that are longer than any."""
    if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
        raise ValueError(f"{shown(where)} is {shown(value)}, expected a number of at most {MAX_NUMBER:,}")
    if isinstance(value, (Mapping, list)):
        if len(value) > MAX_ENTRIES:
            raise ValueError(f"{shown(where)} has {len(value)} entries, expected at most {MAX_ENTRIES:,}")
        entries = value.items() if isinstance(value, Mapping) else ((str(i), item) for i, item in enumerate(value))
        for name, item in entries:
            check_numbers(item, f"{where}.{name}")
