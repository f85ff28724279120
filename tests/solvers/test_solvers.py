"""One contract over every registered solver, and the loop that drives them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.models import load_model
from robustbench_deq.solvers import (
    SOLVERS,
    Anderson,
    Broyden,
    CellMap,
    FixedPointMap,
    NewtonKrylov,
    Picard,
    Solve,
    Status,
)
from robustbench_deq.solvers.anderson import solve_small
from robustbench_deq.solvers.base import Iterate, residual_norms
from robustbench_deq.solvers.krylov import gmres

NAMES = list(SOLVERS)
ACCELERATED = [name for name in NAMES if name != "picard"]
every_solver = pytest.mark.parametrize("name", NAMES)


class Affine(FixedPointMap):
    """`z -> A_i z + b_i`; counts the rows that it evaluates in a list shared by all its restrictions."""

    def __init__(self, a: Tensor, b: Tensor, rows: list[int] | None = None) -> None:
        self.a, self.b, self.rows = a, b, [] if rows is None else rows

    def __call__(self, z: Tensor) -> Tensor:
        self.rows.append(len(z))
        return self.jvp(z, z) + self.b

    def restrict(self, index: Tensor) -> Affine:
        return Affine(self.a[index], self.b[index], self.rows)

    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        return torch.bmm(self.a, tangent[:, :, None])[:, :, 0]

    def fixed_point(self) -> Tensor:
        eye = torch.eye(self.a.shape[1], dtype=self.a.dtype)
        return torch.linalg.solve(eye - self.a, self.b[:, :, None])[:, :, 0]


def contraction(norms: list[float], size: int = 8, seed: int = 0) -> Affine:
    """One random matrix a sample, of the given spectral norms."""
    stream = torch.Generator().manual_seed(seed)
    a = torch.randn(len(norms), size, size, dtype=torch.float64, generator=stream)
    a = a / torch.linalg.matrix_norm(a, ord=2)[:, None, None] * torch.tensor(norms, dtype=torch.float64)[:, None, None]
    return Affine(a, torch.randn(len(norms), size, dtype=torch.float64, generator=stream))


def rotation(scale: float, degrees: tuple[float, ...] = (80.0, 90.0, 100.0)) -> Affine:
    """A block rotation: every eigenvalue has modulus `scale` and lies near the imaginary axis."""
    blocks = []
    for angle in map(math.radians, degrees):
        blocks.append(torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))
    a = scale * torch.block_diag(*blocks).double()[None]
    return Affine(a, torch.linspace(-1, 2, a.shape[1], dtype=torch.float64)[None])


def troubled(kinds: list[str]) -> tuple[CellMap, Tensor]:
    """Rows of three kinds: `good` contracts, `escape` is `z^2 + 10` (no fixed point), `nan` gives NaN."""
    stream = torch.Generator().manual_seed(3)
    mix = torch.randn(4, 4, dtype=torch.float64, generator=stream) / 4
    u = torch.randn(len(kinds), 5, dtype=torch.float64, generator=stream)
    u[:, 0] = torch.tensor([kind == "escape" for kind in kinds])
    u[torch.tensor([kind == "nan" for kind in kinds]), 1:] = torch.nan

    def cell(z: Tensor, u: Tensor) -> Tensor:
        return torch.where(u[:, :1] == 1, z.square() + 10, 0.8 * torch.sin(z @ mix) + u[:, 1:])

    return CellMap(cell, u), torch.zeros(len(kinds), 4, dtype=torch.float64)


def assert_same(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@every_solver
def test_affine_contraction_reaches_closed_form(name: str) -> None:
    norms = [0.0, 0.3, 0.6, 0.9]
    fn = contraction(norms)
    solution = Solve(SOLVERS.get(name)(), rtol=1e-10, max_steps=500)(fn, torch.zeros_like(fn.b))
    exact = fn.fixed_point()
    assert solution.status.tolist() == [Status.CONVERGED] * 4
    assert bool((solution.residual <= 1e-10).all())
    # ||z - z*|| <= ||f(z) - z|| / (1 - ||A||)
    error = torch.linalg.vector_norm(solution.value - exact, dim=1)
    bound = 1.01e-10 * (torch.linalg.vector_norm(exact, dim=1) + 1e-6) / (1 - torch.tensor(norms, dtype=torch.float64))
    assert bool((error <= bound).all())


@every_solver
def test_a_better_start_takes_fewer_steps(name: str) -> None:
    fn = contraction([0.8])
    solve = Solve(SOLVERS.get(name)(), rtol=1e-9, max_steps=500)
    cold = solve(fn, torch.zeros_like(fn.b))
    warm = solve(fn, fn.fixed_point())
    assert int(warm.num_steps) == 1 < int(cold.num_steps)


@pytest.mark.parametrize("scale", [1.0, 1.05])
def test_plain_picard_fails_on_a_rotation(scale: float) -> None:
    fn = rotation(scale)
    solution = Solve(Picard(), rtol=1e-8, max_steps=200)(fn, torch.zeros_like(fn.b))
    assert solution.status.tolist() == [Status.MAX_STEPS]


@pytest.mark.parametrize("scale", [1.0, 1.05])
@pytest.mark.parametrize("name", ACCELERATED)
def test_others_converge_on_a_rotation(name: str, scale: float) -> None:
    # Damping 0.5 turns an eigenvalue i s into 0.5 + 0.5 i s, of modulus below one.
    fn = rotation(scale)
    solution = Solve(SOLVERS.get(name)(), rtol=1e-8, max_steps=200)(fn, torch.zeros_like(fn.b))
    assert solution.status.tolist() == [Status.CONVERGED]
    assert_same(solution.value, fn.fixed_point(), 1e-6)


@every_solver
def test_convolutional_cell_has_one_fixed_point_for_all(name: str, make_model, make_images) -> None:
    model = make_model("deq-conv")
    with torch.no_grad():
        u = model.inject(make_images(3))
    fn, z0 = CellMap(model.cell, u), model.initial_state(u)
    reference = Solve(Picard(damping=0.5), rtol=1e-12, max_steps=2000)(fn, z0)
    assert bool(reference.is_converged.all())
    solution = Solve(SOLVERS.get(name)(), rtol=1e-10, max_steps=500)(fn, z0)
    assert bool(solution.is_converged.all())
    assert_same(solution.value, reference.value, 1e-8)


@every_solver
def test_diverging_and_nan_samples_do_not_touch_the_others(name: str) -> None:
    kinds = ["good", "escape", "good", "nan", "good"]
    fn, z0 = troubled(kinds)
    solve = Solve(SOLVERS.get(name)(), rtol=1e-9, max_steps=200)
    solution = solve(fn, z0)
    assert solution.status[3] == Status.NONFINITE
    assert solution.status[1] != Status.CONVERGED
    if isinstance(solve.solver, Picard):
        assert solution.status[1] == Status.DIVERGED
    assert bool(torch.isfinite(solution.value).all()), "even a failed sample returns its best finite iterate"
    for row in (0, 2, 4):
        index = torch.tensor([row])
        alone = solve(fn.restrict(index), z0[index])
        assert solution.status[row] == alone.status[0] == Status.CONVERGED
        assert_same(solution.value[row], alone.value[0], 1e-8)


def test_divergence_is_measured_by_the_first_residual_of_the_sample_itself() -> None:
    # The first sample starts at its fixed point and leaves the batch; the second grows, but not by 1e6.
    fn = rotation(1.1)
    fn = Affine(fn.a.expand(2, -1, -1), fn.b.expand(2, -1))
    z0 = torch.zeros_like(fn.b)
    z0[0] = fn.fixed_point()[0]
    solution = Solve(Picard(), rtol=1e-9, max_steps=30)(fn, z0)
    assert solution.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    assert solution.num_steps.tolist() == [1, 30]


@every_solver
@settings(max_examples=8)
@given(rows=st.permutations(range(5)), kept=st.integers(1, 5))
def test_permutation_and_batch_mates_change_nothing(name: str, rows: list[int], kept: int) -> None:
    fn = contraction([0.2, 0.5, 0.7, 0.8, 0.85])
    z0 = torch.zeros_like(fn.b)
    solve = Solve(SOLVERS.get(name)(), rtol=1e-9, max_steps=400)
    whole = solve(fn, z0)
    index = torch.tensor(rows[:kept])
    part = solve(fn.restrict(index), z0[index])
    assert_same(part.value, whole.value[index], 1e-7)
    assert torch.equal(part.status, whole.status[index])


@every_solver
def test_permutation_is_exact_in_the_number_of_steps_of_picard_and_close_for_all(name: str) -> None:
    fn = contraction([0.2, 0.5, 0.7, 0.8])
    z0 = torch.zeros_like(fn.b)
    solve = Solve(SOLVERS.get(name)(), rtol=1e-6, max_steps=400)
    index = torch.tensor([3, 1, 0, 2])
    whole, part = solve(fn, z0), solve(fn.restrict(index), z0)
    assert int((part.num_steps - whole.num_steps[index]).abs().max()) <= (0 if isinstance(solve.solver, Picard) else 1)


@every_solver
@pytest.mark.parametrize("compact_below", [0.5, 1.0])
def test_compaction_changes_no_value(name: str, compact_below: float) -> None:
    fn = contraction([0.1, 0.4, 0.6, 0.8, 0.9])
    z0 = torch.zeros_like(fn.b)
    solve = Solve(SOLVERS.get(name)(), rtol=1e-7, max_steps=300, compact_below=0.0, has_trace=True)
    plain, compacted = solve(fn, z0), solve.with_(compact_below=compact_below)(fn, z0)
    assert_same(compacted.value, plain.value, 1e-8)
    assert torch.equal(compacted.status, plain.status)
    assert torch.equal(compacted.num_steps, plain.num_steps)
    assert torch.equal(compacted.trace.isnan(), plain.trace.isnan())
    assert_same(compacted.trace, plain.trace, 1e-6)


@every_solver
def test_looking_less_often_changes_no_value(name: str) -> None:
    fn = contraction([0.1, 0.6, 0.9])
    z0 = torch.zeros_like(fn.b)
    solve = Solve(SOLVERS.get(name)(), rtol=1e-7, max_steps=300)
    often, seldom = solve(fn, z0), solve.with_(check_every=7)(fn, z0)
    assert_same(seldom.value, often.value, 1e-8)
    assert torch.equal(seldom.num_steps, often.num_steps)


@every_solver
@pytest.mark.parametrize("max_steps", [1, 2, 7, 23])
def test_best_iterate_is_returned_when_the_steps_run_out(name: str, max_steps: int) -> None:
    fn = contraction([0.5, 0.99])
    fn.a[1] = rotation(1.2, (80.0, 90.0, 100.0, 110.0)).a[0]  # the residual grows under Picard
    z0 = torch.zeros_like(fn.b)
    solution = Solve(SOLVERS.get(name)(), rtol=1e-300, max_steps=max_steps, has_trace=True)(fn, z0)
    assert set(solution.status.tolist()) <= {Status.MAX_STEPS, Status.CONVERGED}  # an exact zero converges
    assert_same(solution.residual, torch.nan_to_num(solution.trace, nan=torch.inf).amin(0), 0.0)
    assert_same(solution.residual, residual_norms(solution.value, fn(solution.value))[1], 1e-12)


@every_solver
def test_residual_is_that_of_the_returned_value(name: str) -> None:
    fn, z0 = troubled(["good", "escape", "good"])
    solution = Solve(SOLVERS.get(name)(), rtol=1e-6, max_steps=30)(fn, z0)
    assert_same(solution.residual, residual_norms(solution.value, fn(solution.value))[1], 1e-12)


@every_solver
def test_trace_has_a_row_a_step_and_nan_once_frozen(name: str) -> None:
    fn, z0 = troubled(["good", "nan", "good", "escape"])
    z0[2] = Solve(Picard(), rtol=1e-12, max_steps=200)(fn, z0).value[2]  # is there from the first step
    solution = Solve(SOLVERS.get(name)(), rtol=1e-9, max_steps=60, has_trace=True)(fn, z0)
    steps = int(solution.num_steps.max())
    assert solution.trace.shape == (steps, 4)
    assert int(solution.num_steps[1]) == int(solution.num_steps[2]) == 1
    for row in (0, 2, 3):
        count = int(solution.num_steps[row])
        assert bool(torch.isfinite(solution.trace[:count, row]).all())
        assert bool(solution.trace[count:, row].isnan().all())
    assert Solve(SOLVERS.get(name)(), rtol=1e-9)(fn, z0).trace is None


@every_solver
def test_num_steps_counts_the_evaluations_of_each_sample(name: str) -> None:
    fn = contraction([0.0, 0.3, 0.6, 0.9])
    solution = Solve(SOLVERS.get(name)(), rtol=1e-6, max_steps=300, compact_below=1.0)(fn, torch.zeros_like(fn.b))
    assert sum(fn.rows) == int(solution.num_steps.sum())
    assert len(fn.rows) == int(solution.num_steps.max())


@every_solver
def test_one_step_returns_the_start(name: str) -> None:
    fn = contraction([0.5, 0.9])
    z0 = torch.full_like(fn.b, 0.3)
    solution = Solve(SOLVERS.get(name)(), rtol=1e-6, max_steps=1)(fn, z0)
    assert torch.equal(solution.value, z0)
    assert solution.num_steps.tolist() == [1, 1]
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert fn.rows == [2]


@every_solver
def test_start_is_not_written_to(name: str) -> None:
    fn = contraction([0.5, 0.9])
    z0 = torch.full_like(fn.b, 0.3)
    Solve(SOLVERS.get(name)(), rtol=1e-6, max_steps=30)(fn, z0)
    assert bool((z0 == 0.3).all())


@every_solver
@pytest.mark.parametrize("check_every", [1, 7])
def test_empty_batch_gives_an_empty_solution(name: str, check_every: int) -> None:
    fn = contraction([0.5]).restrict(torch.zeros(0, dtype=torch.int64))
    solve = Solve(SOLVERS.get(name)(), rtol=1e-6, max_steps=5, check_every=check_every)
    solution = solve(fn, torch.zeros_like(fn.b))
    assert solution.value.shape == (0, 8)
    assert solution.status.shape == (0,)


@every_solver
def test_history_does_not_grow_with_the_steps(name: str) -> None:
    fn, solver = contraction([0.99, 0.95], size=40), SOLVERS.get(name)()
    z = torch.zeros_like(fn.b)
    state = solver.init(z)
    shapes = [part.shape for part in state]
    for count in range(40):
        z, state = solver.step(fn, Iterate.measure(z, fn(z), count), state)
        assert [part.shape for part in state] == shapes
    assert bool(torch.isfinite(z).all())


@pytest.mark.parametrize("name", ["anderson", "anderson-1", "broyden"])
def test_restart_forgets_the_history_of_the_masked_samples_only(name: str) -> None:
    fn, solver = contraction([0.9, 0.9]), SOLVERS.get(name)()
    z = torch.zeros_like(fn.b)
    state = solver.init(z)
    for count in range(4):
        z, state = solver.step(fn, Iterate.measure(z, fn(z), count), state)
    at = Iterate.measure(z, fn(z), 4)
    kept = solver.step(fn, at, tuple(part.clone() for part in state))[0]
    cleared = solver.restart(tuple(part.clone() for part in state), torch.tensor([True, False]))
    after = solver.step(fn, at, cleared)[0]
    assert_same(after[0], fn(z)[0], 1e-12)  # without a history every one of them takes a Picard step
    assert_same(after[1], kept[1], 1e-12)
    assert float((kept[0] - fn(z)[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("rtol", [0.0, -1e-3, math.nan])
def test_tolerance_must_be_positive(rtol: float) -> None:
    with pytest.raises(UsageError, match="tolerance: expected a number > 0"):
        Solve(Picard(), rtol=rtol)


@pytest.mark.parametrize("max_steps", [0, -3])
def test_steps_must_be_positive(max_steps: int) -> None:
    with pytest.raises(UsageError, match="max_steps: expected an integer >= 1"):
        Solve(Picard(), max_steps=max_steps)


def test_anderson_is_exact_on_an_affine_map_of_the_rank_of_its_history() -> None:
    # Type II is GMRES in disguise: m + 1 columns solve an m-dimensional affine problem.
    fn = contraction([0.9, 0.95], size=3)
    solution = Solve(Anderson(history_size=4, ridge=1e-14), rtol=1e-8, max_steps=6)(fn, torch.zeros_like(fn.b))
    assert bool(solution.is_converged.all())


def test_newton_does_not_creep_where_the_jacobian_says_little() -> None:
    """At the zero state of this model's group norms every Newton step helps by a ten-thousandth."""
    model = load_model("mdeq.fashion-standard").requires_grad_(False)
    with torch.no_grad():
        x = torch.rand(4, *model.input_shape, generator=torch.Generator().manual_seed(0))
        u = model.inject(x)
        solution = Solve(NewtonKrylov(), rtol=1e-3, max_steps=15)(CellMap(model.cell, u), model.initial_state(u))
    assert bool(solution.is_converged.all())


def test_newton_takes_one_step_on_an_affine_map() -> None:
    fn = contraction([0.9, 0.99], size=6)
    solution = Solve(NewtonKrylov(krylov_size=6), rtol=1e-9, max_steps=3)(fn, torch.zeros_like(fn.b))
    assert bool(solution.is_converged.all())
    assert int(solution.num_steps.max()) <= 3


def test_gmres_solves_each_sample_exactly_in_the_full_krylov_space() -> None:
    fn = contraction([0.9, 0.5, 0.1], size=5)
    solution = gmres(lambda v: v - fn.jvp(v, v), fn.b, krylov_size=5)
    assert_same(solution, fn.fixed_point(), 1e-6)


class NoForwardMode(torch.autograd.Function):
    """The hyperbolic tangent, with a backward alone."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return torch.tanh(z)

    @staticmethod
    def backward(ctx, v: Tensor) -> Tensor:
        raise AssertionError("not asked for")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_cell_without_forward_mode_derivatives_is_differenced(scale: float) -> None:
    stream = torch.Generator().manual_seed(0)
    z, v, u = torch.randn(3, 4, 5, dtype=torch.float64, generator=stream)
    z[0], v[1] = 0.0, 0.0
    fn = CellMap(lambda z, u: scale * NoForwardMode.apply(z / scale) * u, u)
    expected = (1 - torch.tanh(z) ** 2) * u * v
    for rows in (torch.arange(4), torch.tensor([2, 1])):
        part = fn.restrict(rows)
        if scale >= 1.0 or 0 not in rows:  # nothing tells how small steps from zero should be
            assert_same(part.jvp(scale * z[rows], v[rows]), expected[rows], 1e-8)
        assert torch.equal(part.jvp(scale * z[rows], v[rows])[rows == 1], torch.zeros(1, 5, dtype=torch.float64))


def test_gmres_of_a_zero_right_hand_side_is_zero() -> None:
    fn = contraction([0.9], size=5)
    solution = gmres(lambda v: v - fn.jvp(v, v), torch.zeros_like(fn.b), krylov_size=5)
    assert torch.equal(solution, torch.zeros_like(solution))


def test_small_systems_fall_back_per_sample() -> None:
    regular = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    matrix = torch.stack([regular, torch.zeros(2, 2, dtype=torch.float64), singular, regular * torch.nan])
    rhs = torch.tensor([[3.0, 1.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)[:, :, None]
    solution = solve_small(matrix, rhs, ridge=0.0, sign=1.0)[:, :, 0]
    assert_same(solution[0], torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert_same(solution[1], torch.zeros(2, dtype=torch.float64))
    assert_same(singular @ solution[2], rhs[2, :, 0], 1e-4)
    assert bool(torch.isfinite(solution).all())


def test_failure_is_an_exception_when_asked(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with torch.no_grad():
        short = model.equilibrium(x, solve=Solve(Picard(), rtol=1e-12, max_steps=2))
        with pytest.raises(RunError, match="3 of 3 samples have no equilibrium"):
            short.require_converged()
        whole = model.equilibrium(x)
    assert whole.require_converged() is whole


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (Anderson, "kind", 3),
        (Anderson, "history_size", 0),
        (Anderson, "damping", 0.0),
        (Anderson, "ridge", -1e-6),
        (Anderson, "patience", 0),
        (Broyden, "history_size", 0),
        (Broyden, "damping", 1.5),
        (Broyden, "patience", 0),
        (Picard, "damping", math.nan),
    ],
)
def test_refuses_settings_out_of_bounds(kind: type, setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"{kind.__name__}\({setting}=...\): expected .*, got {value!r}"):
        kind(**{setting: value})
