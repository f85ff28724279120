"""Devices by name: one that this machine has, or one that some machine may have."""

from __future__ import annotations

import torch

from robustbench_deq.errors import UsageError


def choose_device(name: torch.device | str | None, what: str = "device") -> torch.device:
    """A device of this machine; None is a GPU where there is one, else the CPU.

    Args:
        what: who asks, for the message.

    Raises:
        UsageError: for one that this machine does not have.
    """
    device = named_device(name or ("cuda" if torch.cuda.is_available() else "cpu"), what)
    try:
        torch.empty(1, device=device).item()  # a meta device holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        raise _unknown(name, what) from None
    return device


def named_device(name: torch.device | str, what: str = "device") -> torch.device:
    """One that some machine may have. Raises `UsageError` for a name that torch does not know."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise _unknown(name, what) from None


def _unknown(name: object, what: str) -> UsageError:
    got = repr(name if isinstance(name, str | None) else str(name))
    return UsageError.of(what, expected="cpu, cuda or cuda:N of this machine", got=got, fix="omit it")
