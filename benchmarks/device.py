"""What the benchmark of a GPU needs: the precision of the cell, captured graphs, rounds that wait for the device, data.

**Precision.** `InPrecision` hands every call on to a model, but evaluates its cell in another type under autocast and
returns the state in the type that it came in. States, adjoints, perturbations, residuals, norms and projections stay in
float32, and so do injection and head. In plain float32 the TF32 of the tensor cores is off, also for convolutions,
where torch has it on: the judge's tolerance lies far below its rounding.

**Capture.** `captured` runs a function a few times on a side stream, which lets cuDNN and cuBLAS choose and allocate,
and then records it as a CUDA graph: tensors of fixed shape, nothing that waits for the device. A replay writes to the
same memory as the last one; what differs between calls goes into static buffers.

Source: the documentation of `torch.cuda.graphs` and `torch.amp`.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel

NUM_WARM_UPS = 3
"""Calls on the side stream before a capture."""
NUM_CLASSES = 10


class Precision(enum.Enum):
    """What the cell computes in."""

    FLOAT32 = "float32"
    TF32 = "tf32"  # float32 that the tensor cores round to 10 bits of mantissa, torch's default for convolutions
    BFLOAT16 = "bfloat16"

    @property
    def is_reduced(self) -> bool:
        return self is Precision.BFLOAT16

    def missing(self, device: torch.device) -> str | None:
        """Why this machine cannot do it; None: it can."""
        if self is Precision.FLOAT32 or (self is Precision.BFLOAT16 and device.type == "cpu"):
            return None
        if device.type != "cuda":
            return "needs CUDA"
        is_supported = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if is_supported else "needs a GPU of compute capability 8.0 or more"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """TF32 for matrix products and convolutions, or not, for the length of a block."""
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        has_tf32 = self is Precision.TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = has_tf32
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class InPrecision(EquilibriumModel):
    """`model` with its cell in `precision`.

    Args:
        is_compiled: evaluate the cell by `torch.compile`; the first calls take as long as compiling does.
    """

    def __init__(self, model: EquilibriumModel, precision: Precision, is_compiled: bool = False) -> None:
        super().__init__()
        self.model, self.precision = model, precision
        self.input_shape, self.num_classes = model.input_shape, model.num_classes
        self.solve, self.adjoint = model.solve, model.adjoint
        self.train(model.training)
        self._compiled = torch.compile(self._plain, fullgraph=True, dynamic=False) if is_compiled else None

    def inject(self, x: Tensor) -> Tensor:
        return self.model.inject(x)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return (self._compiled or self._plain)(z, u)

    def head(self, z: Tensor) -> Tensor:
        return self.model.head(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return self.model.initial_state(u)

    def _plain(self, z: Tensor, u: Tensor) -> Tensor:
        if not self.precision.is_reduced:
            return self.model.cell(z, u)
        # Without the cache: it ends with this block, and a captured graph must not read what another call has cast.
        with torch.autocast(z.device.type, torch.bfloat16, cache_enabled=False):
            f = self.model.cell(z, u)
        return f.to(z.dtype)


def captured(work: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """`work` as a CUDA graph: a function that replays it, and returns the same tensors, overwritten, every time.

    Raises:
        RuntimeError: where `work` does what no capture allows, such as waiting for the device.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        outputs = work()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def reason(error: BaseException) -> str:
    """The first line of the error that came first; one in a capture is followed by that of ending it."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


class Clock:
    """The time that is left of a run's `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Runs `work` and returns its seconds, the device idle before and after."""

    def timed() -> float:
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        return time.perf_counter() - start

    return timed


def take_turns(works: Mapping[str, Callable[[], float]], most_rounds: int, seconds: float) -> dict[str, list[float]]:
    """The seconds that each work returns, round by round, back and forth.

    One round at least, then until there are `most_rounds` or another would go beyond `seconds` in all.
    """
    taken: dict[str, list[float]] = {label: [] for label in works}
    begin = time.perf_counter()
    for turn in range(most_rounds):
        spent = time.perf_counter() - begin
        if turn and spent * (turn + 1) / turn > seconds:
            break
        for label in works if turn % 2 == 0 else reversed(list(works)):
            taken[label].append(works[label]())
    return taken


class Images(NamedTuple):
    """Images that are made up: a smooth pattern of each class, with noise.

    shape      `(channels, height, width)`
    amplitude  of the pattern, in pixel units
    noise      standard deviation of the noise
    """

    shape: tuple[int, int, int]
    amplitude: float = 0.3
    noise: float = 0.1

    def split(self, name: SplitName, count: int, seed: int) -> Split:
        """`count` of them; all seeds share the patterns of the classes."""
        channels, height, width = self.shape
        coarse = torch.randn(
            NUM_CLASSES, channels, height // 4, width // 4, generator=torch.Generator().manual_seed(57)
        )
        patterns = F.interpolate(coarse, size=(height, width), mode="bilinear").tanh()
        stream = torch.Generator().manual_seed(seed)
        y = torch.randint(0, NUM_CLASSES, (count,), generator=stream)
        noise = torch.randn(count, *self.shape, generator=stream)
        x = (0.5 + self.amplitude * patterns[y] + self.noise * noise).clamp_(0.0, 1.0)
        return Split("synthetic", name, x, y, torch.arange(count), "", NUM_CLASSES - 1)
