"""Made-up records for the tests of tables, plots and pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from robustbench_deq.bench.records import Record

MakeRecord = Callable[..., Record]


@pytest.fixture
def make_record() -> MakeRecord:
    """Builds a record from a few values; the rest follows from them."""

    def make(
        label: str = "joint PGD-40",
        model: str = "deq-conv",
        robust: float = 0.6875,
        cell_evals: float = 41.0,
        num_samples: int = 256,
        **changes: Any,
    ) -> Record:
        seconds = cell_evals / 10
        curve = [
            {
                "step": step,
                "cell_evals": cell_evals * step / 4,
                "cell_vjps": cell_evals * step / 4,
                "wall_seconds": seconds * step / 4,
                "robust_accuracy": min(1.0, robust + 0.02 * (4 - step)),
            }
            for step in (1, 2, 3, 4)
        ]
        base: dict[str, Any] = {
            "record_id": f"{abs(hash((label, model, robust, cell_evals))):x}",
            "created": "2025-01-31T12:00:00+00:00",
            "model": model,
            "model_sha256": "0123456789abcdef",
            "attack": "joint-pgd",
            "label": label,
            "attack_config": {"steps": 40, "random_start": False, "solver": {"name": "anderson"}},
            "threat": {"norm": "l2", "epsilon": 1.0},
            "data": {"name": "digits", "split": "test", "num_samples": num_samples, "digest": "feedc0de99"},
            "clean_accuracy": 0.875,
            "robust_accuracy": robust,
            "robust_accuracy_ci": [max(0.0, robust - 0.05), min(1.0, robust + 0.05)],
            "adversarial_loss": 0.78,
            "num_unconverged": 3,
            "num_failed": 0,
            "max_perturbation": 1.0,
            "cost": {
                "cell_evals": cell_evals,
                "cell_vjps": cell_evals - 1,
                "solver_steps": 2 * cell_evals,
                "wall_seconds": seconds,
                "peak_memory_mb": 500.0,
            },
            "curve": curve,
            "residuals": [0.5, 0.1, 0.0, None, 0.001],
            "diagnostics": {"fallback_samples": 1.0},
            "seed": 0,
            "batch_size": 128,
            "environment": {"torch": "2.9.0", "threads": 2, "commit": None},
        }
        return Record(**(base | changes))

    return make
