"""Whether a class of one's own is a whole family: what it lacks is said in a sentence before anything is made with
it; and whether its methods about the network return one, its weights, or a number."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from operator import index
from typing import TypeVar

from torch import Tensor, nn

Made = TypeVar("Made")
Network = TypeVar("Network", bound=nn.Module)
DOC = "see docs/own_model.md"


def instance_of(kind: type[Made], contract: type, name: str) -> Made:
    """An object of the family class `kind`, called `name` in the config, which must keep the form of `contract`.

    Raises ValueError naming the method that is absent or takes other arguments, or the attribute that is absent or of
    another kind.
    """
    if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ValueError(f"{name} lacks {'; '.join(described(contract, method) for method in lacking)}; {DOC}")
    for attribute in ("sampling", "objective"):
        _check_options(kind, attribute, getattr(kind, attribute))
    try:
        found = kind()
    except TypeError as error:
        raise ValueError(f"{name} cannot be made without arguments, as a config has to: {error}; {DOC}") from error
    if not isinstance(getattr(found, "name", None), str):
        raise ValueError(f'{name} lacks its name: put name = "{kind.__name__.lower()}" into the class')
    for method, wanted in inspect.getmembers(contract, inspect.isfunction):
        if not method.startswith("_"):
            _check_arguments(getattr(found, method), wanted, f"{kind.__name__}.{method}")
    return found


def count(method: str, returned: object, least: int = 0) -> int:
    """The whole number that `num_classes` or `group` returned. Raises ValueError."""
    try:
        found = index(returned)  # type: ignore[arg-type] # what is no number raises TypeError
    except TypeError:
        found = least - 1
    if found < least:
        raise ValueError(f"{method} must return a whole number >= {least}, it returned {returned!r}")
    return found


def network(method: str, returned: Network) -> Network:
    """The network that `build`, `load` or `adapted` returned. Raises ValueError."""
    if not isinstance(returned, nn.Module):
        raise ValueError(f"{method} must return the network, a torch.nn.Module; it returned {type(returned).__name__}")
    return returned


def networks(method: str, returned: object) -> list[nn.Module]:
    """The networks that `autoencoder_modules` returned. Raises ValueError."""
    if not (isinstance(returned, (list, tuple)) and all(isinstance(one, nn.Module) for one in returned)):
        raise ValueError(
            f"{method} must return a list of the networks that `decode` uses, [] if there are none; it returned "
            f"{type(returned).__name__}"
        )
    return list(returned)


def state(method: str, returned: object) -> Mapping[str, Tensor]:
    """The state dict that `plain` returned. Raises ValueError."""
    if not (isinstance(returned, Mapping) and all(isinstance(value, Tensor) for value in returned.values())):
        raise ValueError(f"{method} must return a state dict, tensors by name; it returned {type(returned).__name__}")
    return returned


def described(contract: type, method: str) -> str:
    """A method of the contract with its arguments and what it gives, in one line."""
    wanted = getattr(contract, method)
    sentence = re.split(r"\.\s", (inspect.getdoc(wanted) or "").replace("\n", " "), maxsplit=1)[0].rstrip(".")
    return f"{method}({_arguments(wanted)}): {sentence}"


def _check_options(kind: type, attribute: str, options: object) -> None:
    if not isinstance(options, type):
        raise ValueError(f"{kind.__name__}.{attribute} must be a dataclass, the class itself; it is {options!r}")
    if not is_dataclass(options):
        raise ValueError(
            f"{kind.__name__}.{attribute} must be a dataclass: put @dataclass(frozen=True, kw_only=True) above "
            f"{options.__name__}"
        )


def _check_arguments(method: object, wanted: Callable[..., object], name: str) -> None:
    if not callable(method):
        raise ValueError(f"{name} must be a method, {name}({_arguments(wanted)}); it is {method!r}")
    parameters = [p for p in inspect.signature(wanted).parameters.values() if p.name != "self"]
    by_name = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(method).bind(*([None] * (len(parameters) - len(by_name))), **by_name)
    except TypeError as error:
        given = ", ".join(inspect.signature(method).parameters)
        raise ValueError(
            f"expected {name}({_arguments(wanted)}), it is {name}(self, {given}): {error}; {DOC}"
        ) from error


def _arguments(method: Callable[..., object]) -> str:
    parameters = inspect.signature(method).parameters.values()
    names = [f"{p.name}=..." if p.kind is p.KEYWORD_ONLY else p.name for p in parameters]
    return ", ".join(names)
