"""Deep equilibrium models: `u = inject(x)`, `z* = f(z*, u)`, `logits = head(z*)`.

A state is one tensor whose first axis is the batch; models with several branches pack them. Images are `(batch,
channels, height, width)` in [0, 1], and normalisation is part of the model. The model never sees a label.

Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019.
"""

from __future__ import annotations

import abc
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_deq.adjoints import DEFAULT_ADJOINT_SOLVE, Adjoint, AdjointTrace, Implicit
from robustbench_deq.callables import Packing, Tensors, modules_behind, zeros_like
from robustbench_deq.errors import UsageError, kind_of
from robustbench_deq.inputs import PIXEL_SLACK, as_labels, shape_fix
from robustbench_deq.meter import Meter
from robustbench_deq.solvers import Anderson, CellMap, Solution, Solve
from robustbench_deq.trial import CONVERSIONS, try_parts


class EquilibriumModel(nn.Module, abc.ABC):
    """Subclasses write `inject`, `cell`, `head` and `initial_state`.

    Attributes:
        input_shape: `(channels, height, width)` of one image.
        num_classes: number of logits.
        solve: how `forward` finds the equilibrium when the call does not say.
        adjoint: how `forward` is differentiated when the call does not say.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    solve: Solve = Solve(Anderson(), rtol=1e-4, max_steps=100)
    adjoint: Adjoint = Implicit(DEFAULT_ADJOINT_SOLVE)
    meter: Meter | None = None
    family: ClassVar[str] = "own"
    is_explicit: ClassVar[bool] = False
    """True where the cell does not look at its state: one evaluation is the equilibrium."""

    @abc.abstractmethod
    def inject(self, x: Tensor) -> Tensor:
        """The input's part `(batch, ...)` of the cell; does not depend on the state."""

    @abc.abstractmethod
    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        """One application of f; same shape as `z`. Rows of the batch must not interact."""

    @abc.abstractmethod
    def head(self, z: Tensor) -> Tensor:
        """Logits `(batch, num_classes)` of a state."""

    @abc.abstractmethod
    def initial_state(self, u: Tensor) -> Tensor:
        """Where a cold solve starts."""

    @staticmethod
    def from_callables(
        inject: Callable[[Tensor], Tensors],
        cell: Callable[..., Tensors],
        head: Callable[..., Tensor],
        initial_state: Callable[..., Tensors] | None = None,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
    ) -> EquilibriumModel:
        """A model in evaluation mode from functions, modules or methods of modules.

        The modules, those whose methods are given and those that functions use (`modules_behind`) are its own.

        Args:
            inject, cell, head: the methods of those names. Injection and state may be tuples of tensors `(batch, ...)`,
                as of several branches: they are packed for solvers and attacks, and the parts get them as tuples.
            initial_state: likewise; None starts with zeros of the injection's shape.
            input_shape: `(channels, height, width)` of one image.
            num_classes: number of logits.

        Raises:
            UsageError: for a part that cannot be called, or for sizes that `check_sizes` refuses.
        """
        start = zeros_like if initial_state is None else initial_state
        parts: dict[str, Callable[..., Tensors]] = {
            "inject": inject,
            "cell": cell,
            "head": head,
            "initial_state": start,
        }
        for name, part in parts.items():
            if not callable(part):
                raise UsageError.of(
                    f"from_callables: {name}",
                    expected="a function or module",
                    got=kind_of(part),
                    fix="pass what computes it",
                )
        check_sizes("from_callables", input_shape, num_classes)
        return _FromCallables(parts, input_shape, num_classes).eval()

    def evaluate(self, z: Tensor, u: Tensor) -> Tensor:
        """`cell(z, u)`, counted. Everything in this package evaluates the cell through here.

        Raises:
            BudgetSpent: when the open meter has a budget that allows no more.
        """
        if self.meter is None:
            return self.cell(z, u)
        self.meter.admit(len(z))
        output = self.cell(z, u)
        self.meter.count_cell(output)
        return output

    def report(self, solution: Solution) -> None:
        """Tell the open meter, if any, of a finished solve."""
        if self.meter is not None:
            self.meter.count_solve(solution)

    def count_steps(self, rows: int) -> None:
        """Tell the open meter, if any, of an iteration on `rows` rows that belongs to no solve."""
        if self.meter is not None:
            self.meter.count_steps(rows)

    def equilibrium(
        self,
        x: Tensor,
        z0: Tensor | None = None,
        *,
        solve: Solve | None = None,
        adjoint: Adjoint | None = None,
        trace: AdjointTrace | None = None,
    ) -> Solution:
        """The equilibrium at `x`.

        Args:
            x: images `(batch, channels, height, width)` in [0, 1].
            z0: a state to start from; None starts cold.
            solve, adjoint: overrides of the model's own.
            trace: filled in by the backward pass.

        Returns:
            A `Solution`. Where gradients are enabled its `value` carries them to `x` and to the parameters, in train
            and in eval mode alike.
        """
        return self.settle(self.inject(x), z0, solve=solve, adjoint=adjoint, trace=trace)

    def settle(
        self,
        u: Tensor,
        z0: Tensor | None = None,
        *,
        solve: Solve | None = None,
        adjoint: Adjoint | None = None,
        trace: AdjointTrace | None = None,
    ) -> Solution:
        """The equilibrium at an injection `u`; else as `equilibrium`, gradients reach `u` and the parameters."""
        solve = solve or self.solve
        z0 = self.initial_state(u).detach() if z0 is None else z0.detach()
        if torch.is_grad_enabled():
            solution, state = (adjoint or self.adjoint).solve(self, u, z0, solve, trace or AdjointTrace())
            return solution._replace(value=state)
        solution = solve(CellMap(self.evaluate, u), z0)
        self.report(solution)
        return solution

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, num_classes)` at the equilibrium.

        `x` is not checked: images of another range, such as 0 to 255, give logits without a meaning. `check_images`
        refuses them; attacks, `evaluate`, the doctor and training call it.
        """
        return self.head(self.equilibrium(x).value)

    def certified_radii(self, z: Tensor, y: Tensor) -> Tensor | None:
        """L2 radii `(batch,)`, float64, in pixel units: no image within its radius is taken for another class than `y`.

        Args:
            z: states at clean images, equilibria to the judge's tolerance.
            y: classes `(batch,)`.

        Returns:
            0 where the class is another one at `z`; None for a model that guarantees nothing, as most do.
        """
        return None

    def check_images(self, x: Tensor) -> None:
        """Raise `UsageError` unless `x` is a batch of finite images in [0, 1] of this model's shape, which it has.

        A pixel may lie `PIXEL_SLACK` outside, which rounding does: whoever takes the images clips them.
        """
        check_sizes("model", getattr(self, "input_shape", None), getattr(self, "num_classes", None))
        if not isinstance(x, Tensor):
            raise UsageError.of("images", expected="a float tensor", got=kind_of(x), fix="pass torch.as_tensor(images)")
        if x.dim() != 4 or tuple(x.shape[1:]) != tuple(self.input_shape) or not x.is_floating_point():
            fix = shape_fix(x.shape[1:], self.input_shape) or "reshape the data or choose a model of its shape"
            raise UsageError.of(
                "images",
                expected=f"a float tensor (batch, {', '.join(map(str, self.input_shape))})",
                got=f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}",
                fix=fix,
            )
        if x.dtype not in CONVERSIONS:
            raise UsageError.of(
                "images",
                expected="float32 or float64",
                got=str(x.dtype).removeprefix("torch."),
                fix="convert images and model with .float()",
            )
        x = x.detach()
        if len(x) == 0:
            raise UsageError.of("images", expected="at least one image", got="an empty batch", fix="pass some data")
        if not bool(torch.isfinite(x).all()):
            raise UsageError.of("images", expected="finite pixels", got="NaN or infinity", fix="clean the data")
        if float(x.min()) < -PIXEL_SLACK or float(x.max()) > 1.0 + PIXEL_SLACK:
            raise UsageError.of(
                "images",
                expected="pixels in [0, 1]",
                got=f"[{float(x.min()):.3g}, {float(x.max()):.3g}]",
                fix="divide by 255, and leave normalisation to the model",
            )

    def check_parts(self, x: Tensor) -> None:
        """Raise `UsageError` unless the parts return what they should on the images `x`, two of which they get: see
        `try_parts`. One evaluation of the cell, which no meter counts."""
        with torch.no_grad():
            try_parts(self, x[:2])

    def check_gradient(self, x: Tensor) -> None:
        """Raise `UsageError` unless autograd leads from the logits back to the images `x`, two of which it looks at.

        One evaluation of the cell, which no meter counts, and its gradient; only a missing graph is refused, a gradient
        of zero is not. Within `no_grad` and inference mode too. An attack without a gradient leaves the images as they
        are, and its model would look robust. Else as `check_parts`.
        """
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x[:2].detach().clone().requires_grad_()
            logits = try_parts(self, leaf).head
            if not logits.requires_grad or torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is None:
                raise UsageError.of(
                    "model",
                    expected="a gradient with respect to the image from inject, cell and head",
                    got="none",
                    fix="run models MODEL --check DATA",
                )


class _FromCallables(EquilibriumModel):
    def __init__(
        self, parts: dict[str, Callable[..., Any]], input_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self._parts = parts
        self.owners = nn.ModuleList(modules_behind(*parts.values()))
        channels, height, width = input_shape
        self.input_shape, self.num_classes = (channels, height, width), num_classes
        self._injection: Packing | None = None
        self._state: Packing | None = None

    def inject(self, x: Tensor) -> Tensor:
        injection = self._parts["inject"](x)
        self._injection = self._injection or Packing(injection)
        return self._injection.pack(injection)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        injection, state = self._packings(z)
        return state.pack(self._parts["cell"](state.unpack(z), injection.unpack(u)))

    def head(self, z: Tensor) -> Tensor:
        return self._parts["head"](self._packings(z)[1].unpack(z))

    def initial_state(self, u: Tensor) -> Tensor:
        if self._injection is None:
            self._look(u)
        assert self._injection is not None
        state = self._parts["initial_state"](self._injection.unpack(u))
        self._state = self._state or Packing(state)
        return self._state.pack(state)

    def _packings(self, like: Tensor) -> tuple[Packing, Packing]:
        """Of injection and state. Their shapes do not change: seen once, at a black image if nobody has called yet."""
        if self._injection is None or self._state is None:
            self.initial_state(self._look(like))
        assert self._injection is not None and self._state is not None
        return self._injection, self._state

    @torch.no_grad()
    def _look(self, like: Tensor) -> Tensor:
        return self.inject(like.new_zeros(1, *self.input_shape))


def check_sizes(what: str, input_shape: object, num_classes: object) -> None:
    """Raise `UsageError` unless `input_shape` is three integers >= 1 and `num_classes` one >= 2.

    Args:
        what: who asks, for the message.
    """
    sides = input_shape if isinstance(input_shape, Sequence) and not isinstance(input_shape, str) else ()
    if len(sides) != 3 or not all(_is_count(side, 1) for side in sides):
        raise UsageError.of(
            f"{what}: input_shape",
            expected="(channels, height, width), three integers >= 1",
            got=tuple(sides) if sides else repr(input_shape),
            fix="name all three",
        )
    if not _is_count(num_classes, 2):
        raise UsageError.of(
            f"{what}: num_classes", expected="an integer >= 2", got=repr(num_classes), fix="count the logits"
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def check_model(model: object, what: str = "model") -> None:
    """Raise `UsageError`, which names `what`, unless `model` is an `EquilibriumModel` that gradients can pass."""
    if not isinstance(model, EquilibriumModel):
        fix = "subclass robustbench_deq.EquilibriumModel, or call its from_callables"
        raise UsageError.of(
            what,
            expected="an EquilibriumModel",
            got=kind_of(model),
            fix=f"pass load_model({model!r})" if isinstance(model, str) else fix,
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError.of(
            what,
            expected="weights that hold numbers",
            got="some on the device meta",
            fix="load them, or build the model on the CPU",
        )
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError.of(
            what,
            expected="weights that gradients can pass",
            got="some made in torch.inference_mode",
            fix="build the model outside of it",
        )


def check_labels(y: Any, num_samples: int, num_classes: int) -> Tensor:
    """Labels `y` as int64 `(num_samples,)`. Raises `UsageError` unless they are classes below `num_classes`.

    Args:
        y: see `as_labels`.
    """
    y = as_labels(y, num_samples)
    if num_samples and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise UsageError.of(
            "labels",
            expected=f"classes 0 to {num_classes - 1}",
            got=f"{int(y.min())} to {int(y.max())}",
            fix="choose a model with that many classes",
        )
    return y
