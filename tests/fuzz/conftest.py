"""The fixtures of tests/core, for run folders."""

from tests.core.conftest import line_config

__all__ = ["line_config"]
