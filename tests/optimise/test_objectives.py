"""What an attack maximises: invariances, signs, and the selection of samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.optimise.objectives import (
    DLR,
    OBJECTIVES,
    CrossEntropy,
    CrossEntropyThenMargin,
    Margin,
    Targeted,
    TowardDLR,
)
from tests.optimise.cases import log_odds

LABELS = torch.tensor([0, 2, 1, 3, 3])
NAMED = [OBJECTIVES.get(name) for name in OBJECTIVES]
seeds = st.integers(0, 10_000)


def logits_of(seed: int, classes: int = 4) -> Tensor:
    return torch.randn(len(LABELS), classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.floats(0.01, 100.0), st.floats(-50.0, 50.0))
def test_dlr_is_invariant_to_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    logits, objective = logits_of(seed), DLR(LABELS)
    torch.testing.assert_close(objective(scale * logits + shift), objective(logits), rtol=1e-8, atol=1e-8)


@given(seeds)
def test_dlr_follows_its_definition(seed: int) -> None:
    logits = logits_of(seed)
    found = DLR(LABELS)(logits)
    for row, label in enumerate(LABELS.tolist()):
        ordered = sorted(logits[row].tolist(), reverse=True)
        wrong = max(value for index, value in enumerate(logits[row].tolist()) if index != label)
        # Croce and Hein 2020, Eq. 6
        expected = -(float(logits[row, label]) - wrong) / (ordered[0] - ordered[2])
        assert float(found[row]) == pytest.approx(expected, rel=1e-9)


def test_dlr_of_two_classes_has_no_gradient_and_is_refused() -> None:
    with pytest.raises(UsageError, match="objective dlr: expected at least three classes, got 2; choose margin"):
        DLR(torch.tensor([0, 1]))(torch.tensor([[2.0, 1.0], [2.0, 1.0]]))


def test_dlr_of_equal_logits_is_finite() -> None:
    assert bool(torch.isfinite(DLR(LABELS)(torch.zeros(5, 4))).all())


@given(seeds)
def test_margin_and_dlr_are_positive_exactly_where_the_prediction_is_wrong(seed: int) -> None:
    logits = logits_of(seed)
    is_wrong = logits.argmax(1) != LABELS
    assert torch.equal(Margin(LABELS)(logits) > 0, is_wrong)
    assert torch.equal(DLR(LABELS)(logits) > 0, is_wrong)


def test_margin_is_the_gap_to_the_best_wrong_class() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    assert Margin(torch.tensor([1, 0]))(logits).tolist() == [-2.0, 4.0]


@given(seeds, st.floats(1e-3, 1e3), st.floats(-50.0, 50.0))
def test_cross_entropy_is_the_log_odds_at_a_temperature_of_the_logits(seed: int, scale: float, shift: float) -> None:
    logits = logits_of(seed)
    expected, slope = log_odds(logits, LABELS)
    leaf = (scale * logits + shift).requires_grad_()
    found = CrossEntropy(LABELS)(leaf)
    torch.testing.assert_close(found / scale, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(Targeted(CrossEntropy(LABELS))(logits), -expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], slope, rtol=1e-7, atol=1e-9)


@given(seeds)
def test_cross_entropy_points_where_the_log_loss_at_its_temperature_does(seed: int) -> None:
    """The log-loss is `log(1 + exp(loss / T))`, an increasing function of it: autograd of torch's own."""
    logits = logits_of(seed)
    leaf = logits.clone().requires_grad_()
    mine = torch.autograd.grad(CrossEntropy(LABELS)(leaf).sum(), leaf)[0]
    temperature = logits.std(1, correction=0, keepdim=True) / 3.0
    other = torch.autograd.grad(F.cross_entropy(leaf / temperature, LABELS, reduction="sum"), leaf)[0]
    torch.testing.assert_close(F.cosine_similarity(mine, other), torch.ones(5).double(), rtol=0, atol=1e-9)
    direct = (CrossEntropy(LABELS)(logits) / temperature[:, 0]).exp().log1p()
    torch.testing.assert_close(direct, F.cross_entropy(logits / temperature, LABELS, reduction="none"))


@pytest.mark.parametrize("is_targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("kind", NAMED)
def test_no_scale_of_the_logits_changes_a_direction_of_ascent(kind: type, is_targeted: bool) -> None:
    """In single precision, where the log-loss of logits times 1000 has no slope left."""
    logits = 2.0 * torch.randn(300, 10, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(300) % 10
    logits[torch.arange(200), labels[:200]] += 8.0  # most of them are sure of their class
    is_third = (logits.topk(3).indices[:, 2] == labels) if kind is DLR else torch.zeros(300, dtype=torch.bool)
    assert int(is_third.sum()) < 20  # where the true class is the third, DLR is the constant 1
    logits, labels = logits[~is_third], labels[~is_third]
    objective = Targeted(kind(labels)) if is_targeted else kind(labels)

    def directions(scale: float, progress: float) -> Tensor:
        leaf = (scale * logits).requires_grad_()
        slope = torch.autograd.grad(objective.at(progress)(leaf).sum(), leaf)[0]
        assert bool((slope != 0).any(1).all()), scale
        return slope / slope.norm(dim=1, keepdim=True)

    for progress in (0.0, 0.9):
        expected = directions(1.0, progress)
        for scale in (1e-3, 1e-1, 1e2, 1e3, 1e5):
            torch.testing.assert_close(directions(scale, progress), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("value", [0.0, 5.0, -1e4])
def test_equal_logits_have_a_loss_and_a_slope(kind: type, value: float) -> None:
    leaf = torch.full((5, 4), value, requires_grad=True)
    loss = kind(LABELS).at(0.0)(leaf)
    slope = torch.autograd.grad(loss.sum(), leaf)[0]
    assert bool(torch.isfinite(loss).all()) and bool((loss.abs() < 1e-6).all())
    assert bool(torch.isfinite(slope).all()) and bool((slope[torch.arange(5), LABELS] < 0).all())


def test_staged_objective_ascends_the_cross_entropy_then_the_margin() -> None:
    logits, staged = logits_of(3), CrossEntropyThenMargin(LABELS)
    for progress, kind in ((0.0, CrossEntropy), (0.49, CrossEntropy), (0.5, Margin), (1.0, Margin)):
        torch.testing.assert_close(staged.at(progress)(logits), kind(LABELS)(logits))
        torch.testing.assert_close(Targeted(staged).at(progress)(logits), -kind(LABELS)(logits))
    torch.testing.assert_close(staged(logits), Margin(LABELS)(logits))
    for kind in NAMED:
        objective = kind(LABELS)
        if kind is not CrossEntropyThenMargin:  # the others are ascended and compared by: one object, one evaluation
            assert objective.at(0.0) is objective is objective.at(0.9)
            wanted = Targeted(objective)
            assert wanted.at(0.3) is wanted


def test_targeted_margin_is_the_lead_of_the_wanted_class() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    assert Targeted(Margin(torch.tensor([1, 0])))(logits).tolist() == [2.0, -4.0]


@pytest.mark.parametrize("kind", NAMED)
def test_losses_are_per_sample_and_take_keeps_the_kind(kind: type) -> None:
    logits, index = logits_of(1), torch.tensor([4, 0, 2])
    objective = kind(LABELS)
    chosen = objective.take(index)
    assert type(chosen) is kind
    assert objective(logits).shape == (5,)
    torch.testing.assert_close(chosen(logits[index]), objective(logits)[index])
    wanted = Targeted(objective).take(index)
    assert type(wanted) is Targeted and type(wanted.objective) is kind
    torch.testing.assert_close(wanted(logits[index]), -objective(logits)[index])
    assert torch.equal(wanted.labels, LABELS[index])


@given(seeds, st.sampled_from(NAMED))
def test_reached_is_another_class_than_the_label_or_the_wanted_one(seed: int, kind: type) -> None:
    logits, index = logits_of(seed), torch.tensor([3, 1])
    is_wrong = logits.argmax(1) != LABELS
    objective, wanted = kind(LABELS), Targeted(kind(LABELS))
    assert torch.equal(objective.is_reached(logits), is_wrong)
    assert torch.equal(wanted.is_reached(logits), ~is_wrong)
    assert torch.equal(objective.take(index).is_reached(logits[index]), is_wrong[index])
    assert torch.equal(wanted.take(index).is_reached(logits[index]), ~is_wrong[index])


def test_titles_tell_losses_apart() -> None:
    kinds = [objective for kind in NAMED for objective in (kind(LABELS), Targeted(kind(LABELS)))]
    titles = [objective.title for objective in kinds]
    assert len(set(titles)) == len(titles) == 2 * len(NAMED)
    assert Targeted(Margin(LABELS)).title == "TargetedMargin" and CrossEntropy(LABELS[:2]).title == "CrossEntropy"


@pytest.mark.parametrize("kind", NAMED)
def test_gradient_of_a_sample_does_not_depend_on_the_others(kind: type) -> None:
    logits = logits_of(2).requires_grad_()
    whole = torch.autograd.grad(kind(LABELS)(logits).sum(), logits)[0]
    one = torch.autograd.grad(kind(LABELS)(logits)[3], logits)[0]
    torch.testing.assert_close(whole[3], one[3])
    assert float(whole[3].abs().max()) > 0
    assert float(one[:3].abs().max()) == 0


def test_ascent_on_every_registered_objective_lowers_the_true_class() -> None:
    for name in OBJECTIVES:
        logits = logits_of(5)
        logits[torch.arange(5), LABELS] += 3.0  # all correct
        leaf = logits.requires_grad_()
        gradient = torch.autograd.grad(OBJECTIVES.get(name)(LABELS)(leaf).sum(), leaf)[0]
        assert bool((gradient[torch.arange(5), LABELS] < 0).all()), name
        better = F.cross_entropy(logits.detach() + 0.1 * gradient, LABELS)
        assert float(better) > float(F.cross_entropy(logits.detach(), LABELS)), name


CLASSES = torch.tensor([1, 0, 3, 2, 0])


@given(seeds, st.floats(0.01, 100.0), st.floats(-50.0, 50.0))
def test_toward_a_class_dlr_follows_its_definition_whatever_the_scale(seed: int, scale: float, shift: float) -> None:
    logits, objective = logits_of(seed, classes=6), TowardDLR(LABELS, CLASSES)
    found = objective(logits)
    for row, (label, wanted) in enumerate(zip(LABELS.tolist(), CLASSES.tolist(), strict=True)):
        ordered = sorted(logits[row].tolist(), reverse=True)
        # Croce and Hein 2020, Eq. 7
        lead = float(logits[row, wanted] - logits[row, label])
        assert float(found[row]) == pytest.approx(lead / (ordered[0] - (ordered[2] + ordered[3]) / 2), rel=1e-9)
    torch.testing.assert_close(objective(scale * logits + shift), found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("logits", "expected"), [
    ([3.0, 1.0, 0.0], -2.0 / 3.0),
    ([3.0, 1.0], -2.0),
    ([3.0, 1.0, 0.0, -torch.inf], -2.0 / 3.0),
    ([3.0, 1.0, -torch.inf, -torch.inf], -2.0),
])  # fmt: skip
def test_toward_a_class_dlr_of_few_classes_takes_those_that_there_are(logits: list[float], expected: float) -> None:
    leaf = torch.tensor([logits], requires_grad=True)
    loss = TowardDLR(torch.tensor([0]), torch.tensor([1]))(leaf)
    assert float(loss.detach()) == pytest.approx(expected)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    assert bool(torch.isfinite(gradient).all()) and float(gradient[0, 1]) > 0 > float(gradient[0, 0])


def test_toward_a_class_any_wrong_one_counts_unless_it_is_aimed_at() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 3, 3, 2])]  # right, another, the wanted one, right, another
    wanted = torch.tensor([1, 0, 3, 2, 0])
    labels = torch.tensor([0, 2, 1, 3, 3])
    rows = torch.tensor([2, 4])
    for is_aimed, reached in ((False, [False, True, True, False, True]), (True, [False, False, True, False, False])):
        objective = TowardDLR(labels, wanted, is_aimed)
        assert objective.is_reached(logits).tolist() == reached
        assert objective.take(rows).is_reached(logits[rows]).tolist() == [reached[2], reached[4]]
