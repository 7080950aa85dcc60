"""EDM networks from the constructor arguments that their files hold."""

from __future__ import annotations

from collections.abc import Mapping

from edm.precond import PRECONDITIONERS, Preconditioner
from neon.checkpoints.limits import shown
from neon.config_table import construct


def denoiser(arch: Mapping[str, object]) -> Preconditioner:
    """A freshly initialised network. arch: `class_name` (EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond) and that
    class's constructor arguments. Raises ValueError if they do not fit."""
    class_name = arch.get("class_name")
    if not isinstance(class_name, str) or class_name not in PRECONDITIONERS:
        raise ValueError(f"arch.class_name must be one of {', '.join(PRECONDITIONERS)}, got {shown(class_name)}")
    arguments = {name: value for name, value in arch.items() if name != "class_name"}
    return construct(PRECONDITIONERS[class_name], arguments, "arch")
