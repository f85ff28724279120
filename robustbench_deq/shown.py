"""How values that hold tensors, arrays or tables are shown: by type and shape, in one short line."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST_TEXT, MOST_ITEMS = 60, 4


def shown(value: Any) -> str:
    """`value` in a few words; a scalar, a short text or a small collection as itself."""
    if hasattr(value, "columns"):
        return f"{len(value)} rows of {len(value.columns)} columns"
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return repr(value.item())
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if hasattr(value, "named_parameters"):
        return type(value).__name__
    if isinstance(value, list | tuple | dict | set) and not hasattr(value, "_fields"):
        if len(value) > MOST_ITEMS:
            return f"{type(value).__name__} of {len(value)}"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
        return "[" + ", ".join(map(shown, value)) + "]"
    text = repr(value)
    return text if len(text) <= LONGEST_TEXT or not isinstance(value, str) else f"{text[: LONGEST_TEXT - 4]}...'"


def briefly_shown(kind: type[T]) -> type[T]:
    """Decorator of a dataclass or named tuple: its `repr` names the fields as `shown`."""

    def short_repr(self: Any) -> str:
        names = getattr(self, "_fields", None) or [field.name for field in dataclasses.fields(self)]
        return f"{type(self).__name__}({', '.join(f'{name}={shown(getattr(self, name))}' for name in names)})"

    kind.__repr__ = short_repr  # type: ignore[assignment,method-assign]  # of every class
    return kind
