"""Budgets: the meter refuses what would exceed one, whoever asks; what was best by then is returned."""

from __future__ import annotations

import pytest
import torch

import robustbench_deq.attacks as _attacks  # noqa: F401
from robustbench_deq.configs import validate
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import ATTACKS, Attack
from robustbench_deq.threats import Threat

WHOLE = {"stop_at_success": False}
SETTINGS = {"joint-pgd": {"steps": 12, "has_fallback": False, **WHOLE}, "pgd": {"steps": 6, **WHOLE}, "noise": WHOLE}


def attack_of(name: str, **settings: object) -> Attack:
    kind = ATTACKS.get(name)
    return kind(Threat(Norm.L2, 0.5), validate(kind.config_type, {**SETTINGS.get(name, {}), **settings}, name))


@pytest.fixture
def case(make_model, make_images):
    return make_model("deq-fc"), make_images(5), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_result_at_a_budget_is_the_last_snapshot_within_it(name: str, case) -> None:
    whole = attack_of(name)(*case, num_snapshots=100)
    for index, snapshot in enumerate(whole.snapshots[:-1]):
        next_cost = whole.snapshots[index + 1].cell_evals
        for budget in (snapshot.cell_evals, (snapshot.cell_evals + next_cost) / 2):
            result = attack_of(name, max_evaluations=budget)(*case)
            torch.testing.assert_close(result.delta, snapshot.delta, rtol=0, atol=0)
            assert snapshot.cell_evals <= result.cost.cell_evals <= budget
            assert result.cost.cell_vjps >= snapshot.cell_vjps  # what was begun and not finished is spent all the same
            assert result.diagnostics["stopped_by_budget"] == 1.0


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("key", ["max_evaluations", "max_seconds"])
def test_budget_that_is_not_reached_changes_nothing(name: str, key: str, case) -> None:
    whole, result = attack_of(name)(*case), attack_of(name, **{key: 1e6})(*case)
    torch.testing.assert_close(result.delta, whole.delta, rtol=0, atol=0)
    assert result.cost.cell_evals == whole.cost.cell_evals
    assert result.diagnostics["stopped_by_budget"] == 0.0
    assert "stopped_by_budget" not in whole.diagnostics


@pytest.mark.parametrize("key", ["max_evaluations", "max_seconds"])
def test_budget_too_small_for_anything_leaves_the_images(key: str, case) -> None:
    result = attack_of("pgd", **{key: 1e-9})(*case)
    assert not result.delta.any()
    assert result.cost.cell_evals == 0


def test_budget_spans_restarts(case) -> None:
    whole = attack_of("noise")(*case, num_snapshots=1)
    assert [snapshot.step for snapshot in whole.snapshots] == list(range(1, 11))
    third = whole.snapshots[2]
    result = attack_of("noise", max_evaluations=third.cell_evals)(*case)
    torch.testing.assert_close(result.delta, third.delta, rtol=0, atol=0)
    assert result.cost.cell_evals == third.cell_evals


def test_model_is_left_alone_by_an_attack_that_is_stopped(case) -> None:
    model = case[0]
    before = [parameter.requires_grad for parameter in model.parameters()]
    attack_of("joint-pgd", max_evaluations=3)(*case)
    assert model.meter is None
    assert [parameter.requires_grad for parameter in model.parameters()] == before and any(before)


def test_attacks_that_show_no_iterate_refuse_budgets() -> None:
    with pytest.raises(UsageError, match="max_evaluations"):
        attack_of("torchattacks-pgdl2", max_evaluations=100)


LADDERS = {"joint-pgd": {"steps": 8}, "joint-apgd": {"steps": 8}, "joint-fmn": {"steps": 8}}


@pytest.mark.parametrize("budget", [3.0, 10.0, 17.0, 40.0])
@pytest.mark.parametrize("name", LADDERS)
def test_the_ladder_keeps_to_the_budget_too(name: str, budget: float, case) -> None:
    """A residual that no sample reaches sends all of them up every rung."""
    settings = {**LADDERS[name], "failure_residual": 1e-12, **WHOLE}
    kind = ATTACKS.get(name)
    whole = kind(Threat(Norm.L2, 0.5), kind.config_type(**settings))(*case)
    assert whole.cost.cell_evals > 60
    model, rows = case[0], []
    cell = model.cell
    model.cell = lambda z, u: rows.append(len(z)) or cell(z, u)
    try:
        found = kind(Threat(Norm.L2, 0.5), kind.config_type(max_evaluations=budget, **settings))(*case)
    finally:
        del model.cell
    unmetered = 2  # rows that show whether there is a gradient
    assert found.cost.cell_evals == (sum(rows) - unmetered) / 5 <= budget
    assert found.diagnostics["stopped_by_budget"] == 1.0
    assert bool(torch.isfinite(found.delta).all())


@pytest.mark.parametrize("name", ["joint-pgd", "pgd", "apgd", "noise"])
def test_restarts_and_refuted_samples_keep_to_the_budget(name: str, case) -> None:
    kind = ATTACKS.get(name)
    settings = {"restarts": 4, "max_evaluations": 20.0, **({"steps": 4} if name != "noise" else {})}
    attack = kind(Threat(Norm.L2, 0.5), validate(kind.config_type, settings, name))
    found = attack(*case, confirm=lambda rows, images: torch.zeros(len(rows), dtype=torch.bool))
    assert 0 < found.cost.cell_evals <= 20
