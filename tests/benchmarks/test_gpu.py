"""The benchmark of a GPU, small and on a CPU; and that what it captures could be captured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device import NUM_WARM_UPS, Clock, Images, InPrecision, Precision, captured, reason, take_turns
from benchmarks.gpu import main
from benchmarks.gpu_parts import SIZES, THREAT, At, Case, step_works
from robustbench_deq.data import SplitName
from robustbench_deq.models import FAMILIES
from robustbench_deq.protocol import frozen


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_small_size_runs_on_a_cpu_and_says_what_it_skips(tmp_path: Path, one_thread: None) -> None:
    arguments = ["--size", "small", "--device", "cpu", "--families", "deq-conv", "--dtypes", "float32,bfloat16,tf32"]
    answer = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert answer.exit_code == 0
    rows = pd.read_csv(tmp_path / "gpu.csv", keep_default_na=False)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert len(kept["rows"]) == len(rows)
    assert (tmp_path / "gpu.png").exists() and (tmp_path / "gpu.svg").exists()
    page = (tmp_path / "gpu.md").read_text()
    first = next(line for line in page.splitlines() if line.startswith("|"))
    assert all(name in first for name in ("device", "torch", "dtype", "batch"))

    for dtype in ("float32", "bfloat16"):
        mine = rows[rows["dtype"] == dtype]
        steps = mine[mine["part"] == "steps"]
        assert set(steps[steps["how"] == "eager"]["what"]) == {"bare work", "augmented", "whole step"}
        notes = dict(zip(steps["how"], steps["note"], strict=True))
        assert notes["eager"] == ""
        assert notes["captured"] == notes["compiled cell, captured"] == "skipped: needs CUDA"
        assert "--compile" in notes["compiled cell"]
        attacks = mine[mine["part"] == "attacks"]
        assert set(attacks["what"]) == {"joint-pgd", "warm PGD-2", "cold PGD-2"}
        assert (attacks["cell VJPs"].astype(float) > 0).all()
        assert (attacks["robust accuracy"].astype(float) <= attacks["clean accuracy"].astype(float)).all()
        assert set(mine[mine["part"] == "training"]["what"]) == {"standard", "joint adversarial"}
    tf32 = rows[rows["dtype"] == "tf32"]
    assert set(tf32["part"]) == {"steps", "attacks", "training"}
    assert set(tf32["note"]) == {"skipped: needs CUDA"}


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path, one_thread: None) -> None:
    arguments = ["--size", "small", "--device", "cpu", "--families", "deq-conv", "--seconds", "0"]
    answer = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert answer.exit_code == 0
    assert set(pd.read_csv(tmp_path / "gpu.csv")["note"]) == {"skipped: no time left"}
    assert not (tmp_path / "gpu.png").exists()


class _NoHost(TorchDispatchMode):
    """Refuses what a capture on a GPU would: waiting for a value, and tensors of the host among the arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")), func
        assert all(part.device.type == "meta" for part in args if isinstance(part, torch.Tensor)), func
        return func(*args, **(kwargs or {}))


def meta_case(family: str) -> tuple[Case, At]:
    """A family of the full size on tensors without values, whose shapes and devices are checked all the same."""
    size = replace(SIZES["full"], steps=2)  # one for each of the two losses
    device, found = torch.device("meta"), FAMILIES.get(family)
    with device:
        model = found.build(found.config_type(input_shape=size.images.shape, **size.families[family])).eval()
        x, y = torch.rand(size.batch, *size.images.shape), torch.zeros(size.batch, dtype=torch.int64)
        state = model.initial_state(model.inject(x)).detach()
    case = Case(family, Precision.FLOAT32, model, x, y, device, size, Clock(0.0), False)
    return case, At(state, torch.zeros_like(state), torch.zeros_like(x))


@pytest.mark.parametrize("family", SIZES["full"].families)
def test_a_step_never_waits_for_the_device(family: str) -> None:
    """Forward and backward, so that it can be captured; a value that were asked for would be an error here."""
    case, at = meta_case(family)
    with frozen(case.model):
        for work in step_works(case.model, case, at).values():
            with _NoHost():
                first = work()[0]
            assert first.shape == case.x.shape


def test_a_graph_is_captured_on_the_stream_that_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA: the order of streams, warm-ups and capture, and that a replay computes nothing."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "side" if isinstance(name, torch.device) else str(name)

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        events.append(f"on {stream.name}")
        yield

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream) -> Iterator[None]:
        events.append(f"capture on {stream.name}")
        yield

    def work() -> tuple[torch.Tensor, ...]:
        events.append("work")
        return (torch.zeros(1),)

    stand_ins = {"Stream": Stream, "CUDAGraph": Graph, "stream": on, "graph": capture}
    for name, value in (stand_ins | {"current_stream": lambda device: Stream("main")}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = captured(work, torch.device("cuda"))
    warm_up = ["side waits for main", "on side", *["work"] * NUM_WARM_UPS, "main waits for side"]
    assert events == [*warm_up, "capture on side", "work"]
    assert replay()[0] is replay()[0]
    assert events[-3:] == ["work", "replay", "replay"]


def test_only_the_cell_is_computed_in_bfloat16() -> None:
    size, found = SIZES["small"], FAMILIES.get("deq-conv")
    model = found.build(found.config_type(input_shape=size.images.shape, **size.families["deq-conv"])).eval()
    reduced, x = InPrecision(model, Precision.BFLOAT16), size.images.split(SplitName.TEST, 4, seed=0).x
    u = model.inject(x)
    z = torch.rand_like(model.initial_state(u)).requires_grad_()
    seen = []
    model.conv_1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    f = reduced.cell(z, u)
    gradient = torch.autograd.grad(f.sum(), z)[0]
    assert seen == [torch.bfloat16]
    assert f.dtype == gradient.dtype == reduced.inject(x).dtype == reduced.head(f).dtype == torch.float32
    with torch.no_grad():
        plain = model.cell(z, u)
        assert 0 < float((f - plain).norm() / plain.norm()) < 0.05


def test_turns_go_back_and_forth_and_end_with_the_time() -> None:
    order: list[str] = []

    def work(label: str):
        def call() -> float:
            order.append(label)
            return 1.0

        return call

    works = {label: work(label) for label in "abc"}
    assert take_turns(works, 2, 100.0) == {label: [1.0, 1.0] for label in "abc"}
    assert "".join(order) == "abccba"
    assert take_turns(works, 5, 0.0) == {label: [1.0] for label in "abc"}


def test_the_reason_is_that_of_the_first_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise RuntimeError("not while capturing\nand more")
        finally:
            raise RuntimeError("the capture is invalid")
    assert reason(caught.value) == "not while capturing"


def test_images_of_all_seeds_share_the_patterns_of_the_classes() -> None:
    images = Images((3, 16, 16), amplitude=0.3, noise=0.01)
    one, other = (images.split(SplitName.TEST, 64, seed) for seed in (0, 1))
    assert not torch.equal(one.x, other.x)
    distance = torch.cdist(other.x.flatten(1), one.x.flatten(1))
    assert torch.equal(one.y[distance.argmin(1)], other.y)
    assert THREAT.epsilon < images.amplitude
