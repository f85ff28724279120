"""What functions bring along that are to be the parts of a model: the modules that they use, and states of several
tensors.
"""

from __future__ import annotations

import collections
import dis
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType

import torch
from torch import Tensor, nn

Tensors = Tensor | Sequence[Tensor]

OPAQUE = ("torch", "robustbench_deq")
"""Packages whose functions and objects hold no module of the user's."""


def modules_behind(*things: object) -> list[nn.Module]:
    """The modules among `things` and behind them, each once.

    Looked through: methods, functions (what they close over, their defaults, the globals that they name), partial
    functions, containers, and the attributes of other objects and of their classes; not what a module holds itself.
    """
    found: list[nn.Module] = []
    seen: dict[int, object] = {}
    left = collections.deque(things)
    while left:
        thing = left.popleft()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            found.append(thing)
        elif isinstance(thing, MethodType):
            left += [thing.__self__, thing.__func__]
        elif isinstance(thing, FunctionType):
            left += _used_by(thing)
        elif isinstance(thing, functools.partial):
            left += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, Mapping):
            left += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            left += thing
        elif not isinstance(thing, ModuleType):
            left += _held_by(thing)
    return found


def _held_by(thing: object) -> list[object]:
    """Attributes of an object or a class, those of its classes and slots too, and what a call of it runs."""
    kind = thing if isinstance(thing, type) else type(thing)
    if _is_opaque(kind):
        return []
    held: list[object] = list(vars(thing).values()) if hasattr(thing, "__dict__") and kind is not thing else []
    for base in kind.__mro__:
        if _is_opaque(base) or base.__module__ == "builtins":
            continue
        for name, value in vars(base).items():
            if isinstance(value, MemberDescriptorType) and kind is not thing:  # a slot
                held.append(getattr(thing, name, None))
            elif isinstance(value, nn.Module | Mapping | list | tuple) or name == "__call__":
                held.append(value)
    return held


def _is_opaque(thing: type | FunctionType) -> bool:
    return (thing.__module__ or "").partition(".")[0] in OPAQUE


def _used_by(function: FunctionType) -> list[object]:
    if _is_opaque(function):
        return []
    used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            used.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    names = dict.fromkeys(_globals_of(function.__code__))
    return used + [function.__globals__[name] for name in names if name in function.__globals__]


def _globals_of(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)


class Packing:
    """Several tensors `(batch, ...)` as one `(batch, size)`; whatever is not several tensors stays as it is.

    Args:
        example: the tensors of a batch of any size.
    """

    def __init__(self, example: Tensors) -> None:
        self.shapes = _shapes(example)

    def pack(self, parts: Tensors) -> Tensor:
        """Raises `ValueError` for tensors of other shapes than those of the example."""
        if self.shapes is None:
            return parts
        if _shapes(parts) != self.shapes:
            raise ValueError(f"expected tensors (batch, ...) of shapes {self.shapes}, got {_shapes(parts) or 'others'}")
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)

    def unpack(self, packed: Tensor) -> Tensors:
        if self.shapes is None:
            return packed
        pieces = packed.split([math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(piece.reshape(len(piece), *shape) for piece, shape in zip(pieces, self.shapes, strict=True))


def zeros_like(tensors: Tensors) -> Tensors:
    return torch.zeros_like(tensors) if isinstance(tensors, Tensor) else tuple(map(torch.zeros_like, tensors))


def _shapes(value: object) -> list[tuple[int, ...]] | None:
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        return [tuple(part.shape[1:]) for part in value]
    return None
