"""A look at what the parts of a model return on some images, before anything relies on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robustbench_deq.callables import modules_behind
from robustbench_deq.errors import UsageError, told

CONVERSIONS = {torch.float32: ".float()", torch.float64: ".double()"}


class Parts(Protocol):
    """What of an `EquilibriumModel` is looked at."""

    num_classes: int
    training: bool

    def inject(self, x: Tensor) -> Tensor: ...
    def cell(self, z: Tensor, u: Tensor) -> Tensor: ...
    def head(self, z: Tensor) -> Tensor: ...
    def initial_state(self, u: Tensor) -> Tensor: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[Tensor]: ...
    def buffers(self) -> Iterator[Tensor]: ...


class PartError(UsageError):
    """A part that raises, or does not return what it should.

    Attributes:
        found, fix: what is wrong with it, and how to fix that.
    """

    def __init__(self, what: str, *, expected: str, got: object, fix: str, found: str | None = None) -> None:
        super().__init__(str(UsageError.of(what, expected=expected, got=got, fix=fix)))
        self.found, self.fix = found or f"{what} gives {got}", fix


class Tried(NamedTuple):
    """What each part has returned, the cell from the initial state; batch first."""

    inject: Tensor
    initial_state: Tensor
    cell: Tensor
    head: Tensor


def try_parts(model: Parts, x: Tensor) -> Tried:
    """What the parts of `model` return on images `x` `(batch, channels, height, width)`.

    Raises:
        PartError: for a module in train mode behind a model that is not, and for the first part that raises or does
            not return one tensor `(batch, ...)`: the cell's of the shape of the initial state, the head's `(batch,
            num_classes)`, and all but the injection of the images' type, float32 or float64; and for one that changes
            what it is given.
    """
    _check_modes(model)
    made: dict[str, Tensor] = {}
    calls: dict[str, Callable[[], object]] = {
        "inject": lambda: model.inject(x),
        "initial_state": lambda: model.initial_state(made["inject"]),
        "cell": lambda: model.cell(made["initial_state"].detach(), made["inject"]),
        "head": lambda: model.head(made["cell"]),
    }
    for part, call in calls.items():
        given = {"images": x, **made}
        before = {name: _num_writes(value) for name, value in given.items()}
        try:
            output = call()
        except UsageError:
            raise
        except Exception as error:  # whatever a foreign model raises
            _check_type(model, x)
            fix, got = f"correct {part}", told(error)
            raise PartError(part, expected="a result", got=got, fix=fix, found=f"{part} raises {got}") from error
        if not isinstance(output, Tensor) or output.dim() < 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise PartError(part, expected="one tensor (batch, ...)", got=got, fix="return one tensor (batch, ...)")
        for name, value in given.items():
            if _num_writes(value) != before[name]:
                name = {"images": "the images", "inject": "the injection"}.get(name, "the state")
                raise PartError(
                    part,
                    expected="its arguments left as they are",
                    got=f"an operation in place on {name}",
                    fix=f"let {part} compute a new tensor, for example z * 2 for z.mul_(2)",
                    found=f"{part} changes {name} in place",
                )
        shape = (len(x), *output.shape[1:])
        if part == "cell":
            shape = tuple(made["initial_state"].shape)
        elif part == "head":
            shape = (len(x), model.num_classes)
        if tuple(output.shape) != shape:
            expected = f"{shape}, a column a class" if part == "head" else f"{shape}"
            raise PartError(part, expected=expected, got=tuple(output.shape), fix=f"return {shape} from {part}")
        if part != "inject" and output.dtype != x.dtype:
            _check_type(model, x)
            raise _wrong_type(part, x, output.dtype)
        made[part] = output
    return Tried(**made)


def _check_modes(model: Parts) -> None:
    """Refuse modules that functions hide, which stay in train mode whatever mode the model is in."""
    if model.training:
        return
    own = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    parts = (getattr(model, name) for name in Tried._fields)
    held = set(model.modules())
    for module in modules_behind(*parts, *own.values()):
        if module not in held and any(inner.training for inner in module.modules()):
            raise PartError(
                "model",
                expected="every module that it uses in evaluation mode",
                got=f"a {type(module).__name__} in train mode that it does not hold",
                fix="call that module's eval(), or assign it to an attribute of the model",
                found=f"it uses a {type(module).__name__} that it does not hold, and that is in train mode",
            )


def _num_writes(value: Tensor) -> int:
    """How often a tensor was written to in place; not counted for those of inference mode."""
    return 0 if value.is_inference() else value._version


def _check_type(model: Parts, x: Tensor) -> None:
    """Name the type of the weights as the cause, where it is not that of the images."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != x.dtype:
            raise _wrong_type("weights", x, tensor.dtype)


def _wrong_type(what: str, x: Tensor, got: torch.dtype) -> PartError:
    wanted, given = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, got))
    fix = f"return {wanted} from {what}"
    if what == "weights":
        fix = f"convert the model with its {CONVERSIONS.get(x.dtype, '.float()')}"
    return PartError(what, expected=f"{wanted}, as the images are", got=given, fix=fix, found=f"{what} gives {given}")
