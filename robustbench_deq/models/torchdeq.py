"""Models written with the torchdeq library (Geng and Kolter, 2023), as `EquilibriumModel`s.

Such a module calls a torchdeq solver inside its `forward`, with a function that closes over the injected input. Here
its parts are named instead, so that the state, the adjoint and the input can advance together:

    model = from_torchdeq(module, inject="encode", cell="layer", head="decode", input_shape=(1, 28, 28), num_classes=10)

`forward` uses the solvers, tolerances and most steps of the module's DEQ object, in our implementation and as relative
residuals per sample; attacks and the judge bring their own. Gradients are implicit, whichever kind the module trains
with, in evaluation mode too, where torchdeq's are cut off. Weights under torchdeq's normalisation are brought up to
date before each injection, as its `reset_deq` does. Its dropout is off in evaluation mode; with it the model cannot be
trained here, since its masks know nothing of samples that have converged and left the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_deq.adjoints import Implicit
from robustbench_deq.callables import Packing, Tensors, zeros_like
from robustbench_deq.equilibrium import EquilibriumModel, check_sizes
from robustbench_deq.errors import UsageError, kind_of, told
from robustbench_deq.solvers import SOLVERS, Solve

SOLVER_OF = {
    "fixed_point_iter": "picard",
    "simple_fixed_point_iter": "picard",
    "anderson_solver": "anderson",
    "broyden_solver": "broyden",
}
"""Ours for each of torchdeq's, by the name of its function."""

Part = str | Callable[..., Tensors]


def from_torchdeq(
    module: nn.Module,
    *,
    inject: Part,
    cell: Part,
    head: Part,
    initial_state: Part | None = None,
    input_shape: tuple[int, int, int],
    num_classes: int,
) -> EquilibriumModel:
    """`module` as an equilibrium model, in evaluation mode; its parameters are the model's.

    Args:
        inject, cell, head, initial_state: the parts of `EquilibriumModel`, by the names of the module's methods or
            submodules, or as functions whose first argument is the module. Where torchdeq keeps a list of tensors, so
            may `inject` and `initial_state` return one: the list is packed for our solvers, and `cell` and `head` get
            it as a tuple. `initial_state` takes the injection; None starts with zeros of the injection's shapes.

    Raises:
        UsageError: when torchdeq is not installed, the module does not hold one DEQ object of it, that object has a
            solver that we have not, a part is missing or returns another shape than it should, or `input_shape` or
            `num_classes` are not sizes.
    """
    try:
        import torchdeq
    except ImportError:
        raise UsageError.of(
            "from_torchdeq", expected="the package torchdeq", got="none", fix="pip install 'robustbench-deq[peers]'"
        ) from None
    if not isinstance(module, nn.Module):
        raise UsageError.of(
            "from_torchdeq", expected="a torch.nn.Module", got=kind_of(module), fix="pass the built network"
        )
    deqs = [part for part in module.modules() if isinstance(part, torchdeq.core.DEQBase)]
    if len(deqs) != 1:
        raise UsageError.of(
            "from_torchdeq",
            expected="a module that holds one torchdeq DEQ object",
            got=f"{len(deqs)} of them",
            fix="assign get_deq(...) to one of its attributes",
        )
    parts = {"inject": inject, "cell": cell, "head": head, "initial_state": initial_state or _zeros}
    for name, part in parts.items():
        if not callable(getattr(module, part, None) if isinstance(part, str) else part):
            raise UsageError.of(
                f"from_torchdeq: {name}",
                expected="a method or submodule",
                got=repr(part),
                fix="pass its name, or a function of the module and the part's own arguments",
            )
    check_sizes("from_torchdeq", input_shape, num_classes)
    model = _TorchDEQ(module, torchdeq.reset_deq, parts, input_shape, num_classes)
    model.solve = _solve_of(deqs[0], "f", deqs[0].eval_f_max_iter)
    model.adjoint = Implicit(_solve_of(deqs[0], "b", deqs[0].b_max_iter))
    return model


class _TorchDEQ(EquilibriumModel):
    def __init__(
        self,
        module: nn.Module,
        reset: Callable[[nn.Module], None],
        parts: dict[str, Part],
        input_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.module, self.reset, self.parts = module, reset, parts
        self.input_shape, self.num_classes = tuple(input_shape), num_classes
        self.eval()
        self._try_parts()

    def _call(self, name: str, *args: Tensors) -> Tensors:
        part = self.parts[name]
        return getattr(self.module, part)(*args) if isinstance(part, str) else part(self.module, *args)

    @torch.no_grad()
    def _try_parts(self) -> None:
        """Learn the shapes of injection and state from two black images, and refuse parts that do not fit together."""
        like = next(self.module.parameters(), torch.empty(0))
        self.reset(self.module)
        injection = self._try("inject", like.new_zeros(2, *self.input_shape))
        state = self._try("initial_state", injection)
        self.injection, self.state = Packing(injection), Packing(state)
        z = self.state.pack(state)
        image = self._try("cell", self.state.unpack(z), self.injection.unpack(self.injection.pack(injection)))
        if Packing(image).shapes != self.state.shapes or self.state.pack(image).shape != z.shape:
            raise UsageError.of(
                "from_torchdeq: cell",
                expected=f"as initial_state, {_describe(state)}",
                got=_describe(image),
                fix="return the same tensors",
            )
        logits = self._try("head", self.state.unpack(z))
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, self.num_classes):
            raise UsageError.of(
                "from_torchdeq: head",
                expected=f"a tensor (2, {self.num_classes}) for a batch of 2",
                got=_describe(logits),
                fix="check head and num_classes",
            )

    def _try(self, name: str, *args: Tensors) -> Tensors:
        try:
            return self._call(name, *args)
        except Exception as error:  # whatever the user's module raises
            raise UsageError.of(
                f"from_torchdeq: {name}",
                expected=f"a part that takes a batch of images {self.input_shape} and what comes of them",
                got=told(error),
                fix="check input_shape and the parts' order",
            ) from error

    def inject(self, x: Tensor) -> Tensor:
        self.reset(self.module)
        return self.injection.pack(self._call("inject", x))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.state.pack(self._call("cell", self.state.unpack(z), self.injection.unpack(u)))

    def head(self, z: Tensor) -> Tensor:
        return self._call("head", self.state.unpack(z))

    def initial_state(self, u: Tensor) -> Tensor:
        return self.state.pack(self._call("initial_state", self.injection.unpack(u)))

    def __deepcopy__(self, memo: dict[int, Any]) -> _TorchDEQ:
        with torch.no_grad():
            self.reset(self.module)  # a normalised weight is an attribute, and with its graph it cannot be copied
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _zeros(module: nn.Module, injection: Tensors) -> Tensors:
    return zeros_like(injection)


def _describe(value: Tensors) -> str:
    """The shape of a tensor, or those of a list."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a list of {', '.join(str(tuple(part.shape)) for part in value)}"


def _solve_of(deq: nn.Module, which: str, max_steps: int) -> Solve:
    """Our solve with the settings of torchdeq's forward ("f") or backward ("b") solver.

    What its absolute tolerance (`stop_mode` "abs") means in relative terms depends on the size of the state; it is
    taken as it is, or as our default where that is smaller.
    """
    function = getattr(deq, f"{which}_solver")
    name = getattr(function, "__name__", repr(function))
    if name not in SOLVER_OF:
        raise UsageError.of(
            f"from_torchdeq: {which}_solver",
            expected=f"one of {', '.join(SOLVER_OF)}",
            got=name,
            fix="set one of these",
        )
    tolerance = getattr(deq, f"{which}_tol")
    if getattr(deq, f"{which}_stop_mode") == "abs":
        tolerance = min(tolerance, EquilibriumModel.solve.rtol)
    return Solve(SOLVERS.get(SOLVER_OF[name])(), rtol=tolerance, max_steps=max_steps)
