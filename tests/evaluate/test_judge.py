"""The judge decides: closed form, and never a point for a sample without an equilibrium or with broken logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_deq.data import load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate import judge as judge_module
from robustbench_deq.evaluate.judge import JUDGE_RTOL, LADDER, MAX_STEPS, SLOW, _relaxation, _Start, judge, tight_solve
from robustbench_deq.meter import Meter
from robustbench_deq.models import FAMILIES, Linear, LinearConfig, load_model
from robustbench_deq.solvers import CellMap, NewtonKrylov, Solve
from robustbench_deq.solvers.base import residual_norms


class Escaping(Linear):
    """Samples whose first pixel is 1 have no equilibrium: their state moves on by one with every evaluation."""

    def inject(self, x: Tensor) -> Tensor:
        u = super().inject(x)
        return torch.cat([(x.flatten(1)[:, :1] == 1).to(u), u], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.where(u[:, :1] == 1, z + 1, super().cell(z, u[:, 1:]))

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[:, 1:])


class Drifting(Linear):
    """f(z, u) = factor * z + u: without an equilibrium for a factor of 1, with a large one for factors just below."""

    factor = 1.0

    def inject(self, x: Tensor) -> Tensor:
        return 0.1 + x.flatten(1)[:, :5]

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.factor * z + u


class OneDrifting(Linear):
    """Beside an ordinary state one component grows by `u > 0` for ever, where the first pixel is above a half."""

    speed = 1.0

    def inject(self, x: Tensor) -> Tensor:
        return torch.cat([super().inject(x), self.speed * torch.relu(x.flatten(1)[:, :1] - 0.5)], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([super().cell(z[:, :-1], u[:, :-1]), z[:, -1:] + u[:, -1:]], dim=1)

    def head(self, z: Tensor) -> Tensor:
        return super().head(z[:, :-1])


class OneSlow(OneDrifting):
    """As `OneDrifting`, but that component has an equilibrium, `factor` first steps away."""

    factor = 1e3

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([Linear.cell(self, z[:, :-1], u[:, :-1]), (1 - 1 / self.factor) * z[:, -1:] + u[:, -1:]], 1)

    def head(self, z: Tensor) -> Tensor:
        return Linear.head(self, z[:, :-1]) + z[:, -1:] * torch.tensor([0.0, 1.0, -1.0])


class Broken(Linear):
    """Logits of samples whose first state entry is above `limit` are spoiled by `value`."""

    value, limit = torch.nan, 0.0

    def head(self, z: Tensor) -> Tensor:
        logits = super().head(z)
        spoiled = torch.full_like(logits[:, :1], self.value)
        return torch.cat([torch.where(z[:, :1] > self.limit, spoiled, logits[:, :1]), logits[:, 1:]], dim=1)


@pytest.fixture
def build(make_images):
    """A model of a test's own kind, in float32, and its images."""

    def make(kind: type[Linear], n: int = 8) -> tuple[Linear, Tensor]:
        return kind(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).eval(), make_images(n, torch.float32)

    return make


def exact_logits(model: Linear, x: Tensor) -> Tensor:
    eye = torch.eye(len(model.a))
    with torch.no_grad():
        u = model.injection(x.flatten(1))
        return torch.linalg.solve(eye - model.a, u.mT).mT @ model.readout.weight.mT


def test_a_state_far_out_is_no_equilibrium(build) -> None:
    """Its step is small beside the state, not by itself."""
    model, x = build(Drifting)
    solution = tight_solve(model, model.inject(x))
    assert not bool(solution.is_converged.any())
    assert not bool(judge(model, x, torch.zeros(len(x), dtype=torch.long)).is_correct.any())


@pytest.mark.parametrize("speed", [100.0, 1.0, 0.01])
def test_one_component_that_grows_for_ever_is_no_equilibrium(speed: float, build) -> None:
    """Whatever the rest of the state does: it is small beside the rest, or the rest small beside it."""
    model, x = build(OneDrifting, 32)
    model.speed = speed
    x[::4, 0, 0, 0] = 0.25
    with torch.no_grad():
        drift = model.inject(x)[:, -1]
    assert int((drift == 0).sum()) >= 8 and int((drift > 0).sum()) > 8
    verdict = judge(model, x, judge(model, x, torch.zeros(32, dtype=torch.long)).prediction)
    assert verdict.is_converged.tolist() == verdict.is_correct.tolist() == (drift == 0).tolist()


def test_one_component_that_grows_is_seen_beside_a_large_network() -> None:
    """A shipped cell, with one component more that grows by the contrast of the image: half of the images drift."""
    plain, data = load_model("deq-conv.digits-joint-l2").eval(), load("digits", limit=10)
    limit = data.x.flatten(1).mean(1).median()

    def inject(x: Tensor) -> Tensor:
        return torch.cat([plain.inject(x).flatten(1), torch.relu(x.flatten(1).mean(1, keepdim=True) - limit)], 1)

    with torch.no_grad():
        shape = plain.inject(data.x[:1]).shape[1:]

    def cell(z: Tensor, u: Tensor) -> Tensor:
        inner = plain.cell(z[:, :-1].unflatten(1, shape), u[:, :-1].unflatten(1, shape))
        return torch.cat([inner.flatten(1), z[:, -1:] + u[:, -1:]], 1)

    def head(z: Tensor) -> Tensor:
        return plain.head(z[:, :-1].unflatten(1, shape))

    model = EquilibriumModel.from_callables(inject, cell, head, input_shape=(1, 8, 8), num_classes=10)
    with torch.no_grad():
        drift = inject(data.x)[:, -1]
    is_clear = (drift == 0) | (drift > 1e-3)
    verdict = judge(model, data.x, data.y)
    assert verdict.is_converged[is_clear].tolist() == (drift == 0)[is_clear].tolist()


@pytest.mark.parametrize("factor", [10.0, 1e3, 1e4])
def test_one_component_whose_equilibrium_is_far_out_converges(factor: float, build) -> None:
    model, x = build(OneSlow)
    model.factor = factor
    u = model.inject(x)
    solution = tight_solve(model, u)
    assert bool(solution.is_converged.all())
    torch.testing.assert_close(solution.value[:, -1], factor * u[:, -1], rtol=0.05, atol=1e-3)
    expected = exact_logits(model, x) + factor * u[:, -1:] * torch.tensor([0.0, 1.0, -1.0])
    assert torch.equal(judge(model, x, torch.zeros(8, dtype=torch.long)).prediction, expected.argmax(1))


SLOW_MODELS = ["deq-fc.digits-joint-l2", "mondeq-fc.digits-joint-l2", "deq-conv.digits-joint-l2"]
"""The first has samples whose spectral radius is above 1; components of the second are cut off at their start."""


@pytest.mark.parametrize("weight", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", SLOW_MODELS)
def test_a_damped_copy_is_judged_as_the_cell_itself(name: str, weight: float) -> None:
    """`z + weight (f - z)` has the equilibria of `f`; single precision knows them to about 1e-7 / weight."""
    plain, data = load_model(name).eval(), load("digits", limit=24)
    model = EquilibriumModel.from_callables(
        plain.inject,
        lambda z, u: torch.lerp(z, plain.cell(z, u), weight),
        plain.head,
        plain.initial_state,
        input_shape=(1, 8, 8),
        num_classes=10,
    )
    expected, found = judge(plain, data.x, data.y), judge(model, data.x, data.y)
    assert torch.equal(found.prediction, expected.prediction)
    assert torch.equal(found.is_converged, expected.is_converged) and bool(found.is_converged.all())
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-2)
    with torch.no_grad():
        u = model.inject(data.x)
        value = tight_solve(model, u).value
        _, residual = residual_norms(value, model.cell(value, u))
    torch.testing.assert_close(found.residual, residual)  # of the cell itself, not of the relaxed one
    assert bool((found.residual <= JUDGE_RTOL).all())


def test_a_cell_that_is_only_slow_at_its_start_is_not_lost(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the relaxed cell has no solver, the cell itself is solved."""
    model, x = build(Linear)
    with torch.no_grad():
        u = model.inject(x)
    expected = tight_solve(model, u)
    monkeypatch.setattr(judge_module, "_relaxation", lambda cell, start: torch.full((8,), 1e30))
    found = tight_solve(model, u)
    assert bool(found.is_converged.all())
    torch.testing.assert_close(found.value, expected.value)


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.1, 1e-3])
def test_relaxation_of_a_damped_linear_cell_is_that_of_its_pace(weight: float, build) -> None:
    """`f(z) = z + weight (u - z)` is brought to where one step solves it, unless it is near that pace by itself."""
    model, x = build(Linear)
    with torch.no_grad():
        u = model.inject(x)
        cell = CellMap(lambda z, u: torch.lerp(z, u, weight), u)
        found = _relaxation(cell, _Start(torch.zeros_like(u), weight * u))
    expected = 1 / weight if 1 / weight > SLOW else 1.0
    torch.testing.assert_close(found, torch.full((8,), expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [-1.5, 0.5, 0.999, 0.9999])
def test_a_large_equilibrium_is_one(factor: float, build) -> None:
    model, x = build(Drifting)
    model.factor = factor
    u = model.inject(x)
    solution = tight_solve(model, u)
    assert bool(solution.is_converged.all())
    torch.testing.assert_close(solution.value, u / (1 - factor), rtol=1e-2, atol=0)


def test_judge_agrees_with_the_closed_form(build) -> None:
    model, x = build(Linear, 16)
    logits = exact_logits(model, x)
    y = logits.argmax(1)
    y[::2] = (y[::2] + 1) % 3
    verdict = judge(model, x, y)
    assert torch.equal(verdict.prediction, logits.argmax(1))
    torch.testing.assert_close(verdict.loss, -logits.log_softmax(1)[torch.arange(16), y], rtol=1e-3, atol=1e-4)
    assert bool(verdict.is_converged.all())
    assert bool((verdict.residual <= JUDGE_RTOL).all())
    assert verdict.is_correct.tolist() == [False, True] * 8


def test_residual_is_that_of_the_state_that_was_read(build) -> None:
    model, x = build(Linear)
    with torch.no_grad():
        u = model.inject(x)
        solution = tight_solve(model, u)
        f = model.cell(solution.value, u)
    recomputed = (f - solution.value).norm(dim=1) / (f.norm(dim=1) + 1e-8)
    torch.testing.assert_close(solution.residual, recomputed, rtol=1e-3, atol=1e-8)
    assert torch.equal(judge(model, x, torch.zeros(8, dtype=torch.int64)).residual, solution.residual)


def test_sample_without_an_equilibrium_is_never_correct(build) -> None:
    model, x = build(Escaping, 4)
    x[::2, 0, 0, 0] = 1.0
    y = judge(model, x, torch.zeros(4, dtype=torch.int64)).prediction
    verdict = judge(model, x, y)  # the labels are what the states read, converged or not
    assert torch.equal(verdict.prediction, y)
    assert verdict.is_converged.tolist() == [False, True, False, True]
    assert verdict.is_correct.tolist() == [False, True, False, True]
    assert bool((verdict.residual[::2] > JUDGE_RTOL).all())


def test_lost_batch_mates_do_not_matter(build) -> None:
    model, x = build(Escaping, 4)
    x[0, 0, 0, 0] = 1.0
    x[2] = torch.nan
    y = torch.arange(4) % 3
    whole = judge(model, x, y)
    assert whole.is_converged.tolist() == [False, True, False, True]
    assert not bool(whole.is_correct[::2].any())
    for row in range(4):
        alone = judge(model, x[row : row + 1], y[row : row + 1])
        for field in ("is_converged", "is_correct"):
            assert torch.equal(getattr(alone, field)[0], getattr(whole, field)[row])
        if row % 2:
            assert torch.equal(alone.prediction[0], whole.prediction[row])
            torch.testing.assert_close(alone.loss[0], whole.loss[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_never_correct(build, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "value", value)
    model, x = build(Broken)
    with torch.no_grad():
        entry = tight_solve(model, model.inject(x)).value[:, 0]
    model.limit = float(entry.median())
    is_broken = entry > model.limit
    assert 0 < int(is_broken.sum()) < 8, "the test needs samples of both kinds"
    for label in range(3):
        verdict = judge(model, x, torch.full((8,), label))
        assert bool(verdict.is_converged.all()), "that is about the state"
        assert torch.equal(verdict.is_readable, ~is_broken)
        assert not bool(verdict.is_correct[is_broken].any())
        assert bool(verdict.loss[is_broken].isnan().all())
        assert bool(torch.isfinite(verdict.loss[~is_broken]).all())
        assert torch.equal(verdict.is_correct[~is_broken], verdict.prediction[~is_broken] == label)


def test_a_masked_class_leaves_the_verdict_as_it_is(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(Linear)
    y = torch.arange(8) % 3
    plain, head = judge(model, x, y), model.head
    monkeypatch.setattr(model, "head", lambda z: F.pad(head(z), (0, 1), value=-torch.inf))
    assert all(map(torch.equal, judge(model, x, y).parts(), plain.parts()))
    monkeypatch.setattr(model, "head", lambda z: torch.full_like(head(z), -torch.inf))
    verdict = judge(model, x, y)
    assert not bool(verdict.is_readable.any()) and not bool(verdict.is_correct.any())


class Attention(EquilibriumModel):
    """`f(z, u) = u - gain W z` on four tokens, W an attention that torch has no forward-mode derivative of."""

    input_shape, num_classes = (1, 4, 4), 3

    def __init__(self, gain: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gain = gain

    def inject(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (4, 4))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u - self.gain * z + self.attention(z, z, z, need_weights=False)[0]

    def head(self, z: Tensor) -> Tensor:
        return z.sum(1)[:, :3]

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


def test_cells_without_forward_mode_derivatives_are_solved_and_judged(make_images) -> None:
    """By Newton-Krylov too, which takes finite differences in their place."""
    model, x = Attention(gain=3.0).eval(), make_images(4, torch.float32)
    with torch.no_grad():
        z = u = model.inject(x)
        with pytest.raises(NotImplementedError):
            torch.func.jvp(lambda z: model.cell(z, u), (z,), (z,))
        newton = Solve(NewtonKrylov(krylov_size=20), rtol=JUDGE_RTOL, max_steps=100)(CellMap(model.evaluate, u), z)
    assert bool(newton.is_converged.all()) and bool(tight_solve(model, u).is_converged.all())
    torch.testing.assert_close(newton.value, tight_solve(model, u).value, rtol=1e-3, atol=1e-4)


def test_later_rungs_save_what_the_first_one_cannot(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(Linear)
    with torch.no_grad():
        model.a.copy_(1.5 * torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0])
    y = exact_logits(model, x).argmax(1)
    assert bool(judge(model, x, y).is_correct.all())
    # With a first rung that cannot succeed, the next one takes over.
    assert not bool(judge(model, x, y, [LADDER[0].with_(max_steps=2)]).is_converged.any())
    assert bool(judge(model, x, y, [LADDER[0].with_(max_steps=2), *LADDER[1:]]).is_correct.all())


def test_rungs_go_on_from_the_best_state_so_far(build) -> None:
    model, x = build(Linear)
    short = LADDER[0].with_(rtol=1e-30, max_steps=4)
    with torch.no_grad():
        u = model.inject(x)
        first = tight_solve(model, u, [short])
        second = short(CellMap(model.cell, u), first.value)
        found = tight_solve(model, u, [short, short])
    assert bool((second.residual < first.residual).all())
    assert torch.equal(found.residual, second.residual) and torch.equal(found.value, second.value)
    assert not bool(found.is_converged.any())


def test_a_sample_without_an_equilibrium_costs_no_more_than_the_cap(build) -> None:
    """A quarter of the images have none; the others are judged as ever, and cost what they cost alone."""
    model, x = build(Escaping, 16)
    x[::4, 0, 0, 0] = 1.0
    is_lost = x[:, 0, 0, 0] == 1
    y = torch.zeros(16, dtype=torch.int64)
    with Meter(model) as whole:
        verdict = judge(model, x, y)
    with Meter(model) as others:
        judge(model, x[~is_lost], y[~is_lost])
    assert verdict.is_converged.tolist() == (~is_lost).tolist()
    lost = (whole.eval_rows - others.eval_rows) / 4
    assert lost <= MAX_STEPS + 60


@pytest.mark.parametrize("family", list(FAMILIES))
def test_batch_mates_do_not_matter(family: str, make_model, make_images) -> None:
    model, x, y = make_model(family), make_images(6), torch.arange(6) % 3
    whole = judge(model, x, y)
    assert bool(whole.is_converged.all())
    order = torch.tensor([4, 1, 5])
    part = judge(model, x[order], y[order])
    assert torch.equal(part.prediction, whole.prediction[order])
    assert torch.equal(part.is_correct, whole.is_correct[order])
    torch.testing.assert_close(part.loss, whole.loss[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["deq-conv.digits-joint-l2", "deq-fc.digits-joint-l2"])
def test_a_verdict_is_the_same_in_batches_of_any_size(name: str) -> None:
    """To the last bit in float32: one row alone is rounded as it is among many."""
    model, data = load_model(name).eval(), load("digits", limit=9)
    whole = judge(model, data.x, data.y)
    for size in (1, 2, 5):
        parts = [judge(model, x, y) for x, y in zip(data.x.split(size), data.y.split(size), strict=True)]
        for index, expected in enumerate(whole.parts()):
            assert torch.equal(torch.cat([part.parts()[index] for part in parts]), expected)


def test_judging_leaves_mode_and_gradients_alone(build) -> None:
    model, x = build(Linear)
    model.train()
    x.requires_grad_()
    verdict = judge(model, x, torch.zeros(8, dtype=torch.int64))
    assert model.training
    assert not verdict.loss.requires_grad
    assert x.grad is None and all(parameter.grad is None for parameter in model.parameters())
