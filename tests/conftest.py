"""Shared by all tests: one thread, deterministic hypothesis, an order that keeps workers busy, and tiny models made by
name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.models import FAMILIES
from robustbench_deq.solvers import Anderson, Solve
from tests.runner.small_suite import do

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")

SHAPE, NUM_CLASSES = (1, 4, 4), 3
SMALL = {
    "deq-fc": {"hidden": 6},
    "deq-conv": {"channels": 4, "groups": 2, "strides": (1, 1)},
    "mondeq-fc": {"hidden": 6},
    "test-linear": {"hidden": 5},
    "mondeq-conv": {"channels": 3, "stride": 1},
    "mondeq-multi": {"channels": (2, 3), "stride": 1},
    "lben": {"hidden": 6},
    "mdeq": {"channels": (4, 4), "head_channels": (2, 2), "groups": 2, "expansion": 1},
    "unrolled": {"cell": "deq-conv", "cell_config": {"channels": 4, "groups": 2, "strides": [1, 1]}, "num_steps": 4},
    "resnet": {"channels": (4, 4), "groups": 2, "stem_stride": 1},
}


WAITING = [
    Path(__file__).parent / name
    for name in (
        "runner/test_ray.py",
        "benchmarks/test_kills.py",
        "runner/test_run.py",
        "runner/test_clean.py",
        "commands/test_cli.py",
        "test_packaging.py",
        "test_memory.py",
    )
]
"""Modules whose tests wait for processes that they start. They come first, so that others fill the time."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Waiting tests first; then, in a module, those of an attack and a family together, which share its runs. Workers
    that are given stretches of the list (`--dist worksteal`) take the rest from each other."""

    def place(item: pytest.Item) -> tuple[int, str, str]:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        shared = item.callspec.id if {"case", "family"} <= params.keys() else ""
        return WAITING.index(item.path) if item.path in WAITING else len(WAITING), item.path.as_posix(), shared

    items.sort(key=place)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., EquilibriumModel]:
    """`make_model(family, dtype, seed, rtol, **config)`: a small untrained model in eval mode, solved to `rtol`."""

    def make(
        family: str, dtype: torch.dtype = torch.float64, seed: int = 0, rtol: float = 1e-12, **config: object
    ) -> EquilibriumModel:
        entry = FAMILIES.get(family)
        values = {"input_shape": SHAPE, "num_classes": NUM_CLASSES, **SMALL.get(family, {}), **config}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = entry.build(entry.config_type(**values)).to(dtype).eval()
        model.solve = Solve(Anderson(), rtol=rtol, max_steps=500)
        model.adjoint = Implicit(Solve(Anderson(), rtol=rtol, max_steps=500))
        return model

    return make


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Tensor]:
    """`make_images(n, dtype, seed, shape)`: pixels drawn uniformly from [0, 1]."""

    def make(n: int, dtype: torch.dtype = torch.float64, seed: int = 1, shape: tuple[int, int, int] = SHAPE) -> Tensor:
        return torch.rand(n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def logit_gain() -> Callable[[EquilibriumModel, Tensor], float]:
    """`logit_gain(model, x)`: the largest gain `||d logits / d x||_2` at the images `x`."""

    def gain(model: EquilibriumModel, x: Tensor) -> float:
        rows = []
        for column in range(model.num_classes):
            leaf = x.clone().requires_grad_()
            rows.append(torch.autograd.grad(model(leaf)[:, column].sum(), leaf)[0].flatten(1))
        return float(torch.linalg.matrix_norm(torch.stack(rows, dim=1), ord=2).max())

    return gain


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small suite, done in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    do(folder)
    return folder
