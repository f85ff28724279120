"""Which iterate is returned: every rule against itself by hand, one offer after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from robustbench_deq.optimise import (
    Ball,
    Classification,
    HighestLoss,
    JIIORule,
    Joint,
    Keep,
    Last,
    Norm,
    ProjectedAscent,
    Schedule,
    SmallestNorm,
    optimise,
)
from robustbench_deq.optimise.keep import Kept
from robustbench_deq.optimise.objectives import CrossEntropy
from robustbench_deq.optimise.sources import Look
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.optimise.steps import At
from robustbench_deq.solvers.base import residual_norms
from robustbench_deq.threats import Threat

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
RULES = {
    "loss": HighestLoss,
    "jiio": lambda *limits: JIIORule(),
    "last": lambda *limits: Last(),
    "norm": SmallestNorm,
}


@dataclass(frozen=True)
class Recording(Keep):
    """A rule that remembers what it was offered."""

    rule: Keep
    offers: list[tuple[Tensor, Look]] = field(default_factory=list)

    @property
    def sees_last(self) -> bool:  # type: ignore[override]
        return self.rule.sees_last

    def offer(self, kept: Kept, problem, domain, variable: Tensor, look: Look, count: int, is_last: bool) -> Kept:
        assert count == len(self.offers)
        self.offers.append((variable, look))
        return self.rule.offer(kept, problem, domain, variable, look, count, is_last)


@dataclass(frozen=True)
class Offer:
    """Of one row."""

    size: float
    loss: float
    residual: float
    residual_mu: float
    is_success: bool  # with a gradient, and beyond the linearised boundary


def kept_by_hand(rule: str, limit: float, offers: list[Offer]) -> int:
    """Which of the offers the rule returns for a row."""
    best, best_loss, best_joint, best_size = -1, -torch.inf, torch.inf, torch.inf
    for index, offer in enumerate(offers):
        joint, is_trusted = offer.residual + offer.residual_mu, offer.residual <= limit
        if rule == "last":
            best = index
        elif rule == "jiio":
            if index < 10 or joint < best_joint or (offer.loss > best_loss and joint < 1.3 * best_joint):
                best, best_loss, best_joint = index, offer.loss, joint
        elif rule == "norm" and is_trusted and offer.is_success:
            if offer.size < best_size:
                best, best_size = index, offer.size
        elif best_size < torch.inf:
            continue
        elif is_trusted and offer.loss > best_loss:
            best, best_loss = index, offer.loss
        elif best_loss == -torch.inf:
            best = index
    return best


def beyond(variable: Tensor, look: Look) -> Tensor:
    """Successes that count for the smallest norm, in Linf, whose dual norm is L1."""
    if look.gradient is None:
        return torch.zeros(len(variable), dtype=torch.bool)
    reach = Norm.LINF.size(variable) * look.gradient.flatten(1).abs().sum(1)
    return (look.output.argmax(1) != LABELS) & (look.loss >= 0.015 * reach)


@pytest.mark.parametrize("limit", [0.1, 0.05, -1.0])
@pytest.mark.parametrize("name", RULES)
def test_kept_iterate_is_the_one_of_the_rule(name: str, limit: float, make_model, make_images) -> None:
    model, x = make_model("deq-fc", hidden=8), make_images(6)
    problem, ball = Classification(model, x, CrossEntropy(LABELS)), Threat(Norm.LINF, 0.4).ball(x)
    step = ProjectedAscent(1.5, Schedule.CONSTANT)  # long steps that oscillate
    keep, start = Recording(RULES[name](limit, limit)), torch.zeros_like(x)
    found = optimise(problem, Joint(has_loss_start=False), ball, step, keep, start, num_steps=25)

    variable, look = keep.offers[24]
    last, _ = step.step(At(variable, look.gradient, look.loss, look.residual, None, Moment(24, 25), 0, None), ball, ())
    with torch.no_grad():  # the last variable is looked at through the state after it
        f = model.cell(look.f, model.inject(x + last))
        loss, residual = CrossEntropy(LABELS)(model.head(f)), residual_norms(look.f, f)[1]
    if name == "jiio":  # which has no joint residual for the variable after the last step
        assert len(keep.offers) == 25
    else:
        torch.testing.assert_close(keep.offers[25][0], last)
        torch.testing.assert_close(keep.offers[25][1].loss, loss)
        torch.testing.assert_close(keep.offers[25][1].residual, residual)
    torch.testing.assert_close(found.residual, residual)

    offers = [
        [
            Offer(size, *values, is_success)
            for size, *values, is_success in zip(
                Norm.LINF.size(variable).tolist(),
                look.loss.tolist(),
                look.residual.tolist(),
                residual_norms(look.mu, look.g)[1].tolist(),
                beyond(variable, look).tolist(),
                strict=True,
            )
        ]
        for variable, look in keep.offers
    ]
    chosen = [kept_by_hand(name, limit, [of[row] for of in offers]) for row in range(6)]
    expected = torch.stack([keep.offers[index][0][row] for row, index in enumerate(chosen)])
    torch.testing.assert_close(found.variable, expected)
    if name in ("loss", "norm") and limit == 0.05:  # the case tells the rules apart
        assert len(set(chosen)) > 1 and min(chosen) < 25
    if name in ("loss", "norm") and limit < 0:  # nothing can be trusted: the last one, and no loss
        assert set(chosen) == {25} and bool(torch.isneginf(found.loss).all())


def offered(rule: Keep, sizes: list[float], losses: list[float], residuals: list[float]) -> tuple[float, float]:
    """What one row keeps of a sequence: its size and loss. A row succeeds where its loss is positive."""

    class Given(Classification):
        def is_success(self, output: Tensor) -> Tensor:
            return output[:, 0] > 0

    x = torch.full((1, 1, 1, 1), 0.5)
    problem, ball = Given(None, x, CrossEntropy(torch.tensor([0]))), Ball(Norm.L2, 0.5, x)
    kept = rule.init(torch.full_like(x, -0.01))
    for count, (size, loss, residual) in enumerate(zip(sizes, losses, residuals, strict=True)):
        loss, residual = torch.tensor([loss]), torch.tensor([residual])
        look = Look(loss, residual, loss[:, None], gradient=torch.ones_like(x))
        kept = rule.offer(kept, problem, ball, torch.full_like(x, size), look, count, count == len(sizes) - 1)
    return pytest.approx(float(kept.variable)), pytest.approx(float(kept.loss))


def test_highest_loss_counts_where_the_state_has_settled() -> None:
    rule, nan, inf = HighestLoss(0.01, 0.1), float("nan"), float("inf")
    assert offered(rule, [0.1, 0.2, 0.3], [1.0, 5.0, 2.0], [0.0, 0.02, 0.0]) == (0.3, 2.0)
    assert offered(rule, [0.1, 0.2, 0.3], [1.0, 5.0, 6.0], [0.0, 0.02, 0.09]) == (0.3, 6.0)  # the last one's own limit
    assert offered(rule, [0.1, 0.2, 0.3], [1.0, 5.0, 6.0], [0.5, 0.02, nan]) == (0.2, -inf)  # newest finite one
    assert offered(rule, [0.1], [1.0], [nan]) == (-0.01, -inf)


def test_smallest_norm_prefers_any_success_to_any_loss() -> None:
    rule, inf = SmallestNorm(0.01, 0.1), float("inf")
    assert offered(rule, [0.1, 0.4, 0.3, 0.2], [-1.0, 1.0, 0.5, -0.1], [0.0] * 4) == (0.3, 0.5)
    assert offered(rule, [0.1, 0.4, 0.3], [-1.0, 1.0, 0.5], [0.0, 0.0, 0.2]) == (0.4, 1.0)
    assert offered(rule, [0.1, 0.4, 0.3], [-2.0, -1.0, -3.0], [0.0, 0.0, 0.0]) == (0.4, -1.0)
    assert offered(rule, [0.1, 0.4, 0.3], [-2.0, 1.0, 2.0], [0.0, 0.5, 0.5]) == (0.1, -2.0)  # no trusted success
    assert offered(rule, [0.1, 0.4], [-2.0, 1.0], [0.5, 0.5]) == (0.4, -inf)
    # right at the linearised boundary a success is not trusted: 0.4 * 0.015 is 0.006
    assert offered(rule, [0.45, 0.4], [1.0, 0.0059], [0.0, 0.0]) == (0.45, 1.0)
    assert offered(rule, [0.45, 0.4], [1.0, 0.0061], [0.0, 0.0]) == (0.4, 0.0061)


def test_last_is_the_newest_whatever_it_is() -> None:
    assert offered(Last(), [0.1, 0.4, 0.3], [3.0, 1.0, 2.0], [0.0, 0.0, 9.0]) == (0.3, 2.0)


def test_rows_are_kept_each_for_itself_and_can_be_taken() -> None:
    variable = torch.tensor([[[[1.0]]], [[[2.0]]], [[[3.0]]]])
    kept = HighestLoss(0.01, 0.01).init(variable)
    assert bool(torch.isneginf(kept.loss).all()) and bool((kept.score == torch.inf).all())
    taken = kept.take(torch.tensor([2, 0]))
    assert taken.variable.flatten().tolist() == [3.0, 1.0] and taken.loss.shape == taken.score.shape == (2,)
