"""Labels and ids as users bring them: what is converted, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.fixes import label_fix


def as_labels(labels: Any, num_samples: int, what: str = "labels") -> Tensor:
    """Class indices `(num_samples,)` as int64, on their device; nothing is rounded.

    Args:
        labels: a tensor, array or list of any integer type, or of truth values.
        what: whose labels they are, for the message.

    Raises:
        UsageError: for another shape or type, one-hot rows and floats among them.
    """
    try:
        found = torch.as_tensor(labels)
        got = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
    except (TypeError, ValueError, RuntimeError):  # objects, text, rows of several lengths
        found, got = torch.zeros(()), f"{getattr(labels, 'dtype', type(labels).__name__)}"
    if found.shape != (num_samples,) or found.is_floating_point() or found.is_complex():
        fix = label_fix(found.shape, num_samples)
        raise UsageError.of(what, expected=f"an integer tensor ({num_samples},)", got=got, fix=fix)
    return found.long()


def as_ids(ids: Any, num_samples: int, what: str = "sample_ids") -> Tensor:
    """Integers >= 0 `(num_samples,)`, one per sample, as int64.

    Raises:
        UsageError: for another shape or type, or a negative number.
    """
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(())
    is_number = not (found.is_floating_point() or found.is_complex() or found.dtype is torch.bool)
    if found.shape == (num_samples,) and is_number and not bool((found.long() < 0).any()):
        return found.long().clone()
    raise UsageError.of(
        what,
        expected=f"{num_samples} integers >= 0",
        got=f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}",
        fix="pass one per image, or None to number them",
    )
