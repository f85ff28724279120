"""Warnings that users can do nothing about."""

from __future__ import annotations

import warnings


def ignore_torch_deprecations() -> None:
    """Hide that torch's own forward-mode code calls what torch deprecates. For programs, never done on import."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
