"""Equilibrium solves: every registered solver on every family, forward and adjoint, beside torchdeq's own.

    python -m benchmarks.solves

Every solver gets the same cell, images, start and most evaluations, and stops at the same relative residual
`||f(z) - z|| / ||f(z)||`: ours each sample by itself, torchdeq's when the last sample is there. What they return is
measured once more by us. The memory is the same: torchdeq's Anderson counts iterates (6), ours their differences (5);
Broyden's terms are 30. torchdeq's variants are those that favour it: a smaller ridge (its own is absolute), and a
memory of all steps, which is its default. A problem's solvers take turns, back and forth, and what counts is the median
of the ratios within a round, with its interval. Solvers of ours that torchdeq has none of are timed less often.

The adjoint is that of the cross-entropy at the equilibrium, from its Jacobian-free start. The explicit twins are left
out: their cells do not look at the state.

Last, freezing: batches of easy and hard samples are solved with samples leaving the batch as they converge, and with
all of them staying until the last has.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor
from torchdeq.solver import get_solver

from benchmarks.timing import RESULTS, Ratio, alternate, keep, say
from robustbench_deq.adjoints import AdjointMap
from robustbench_deq.data import Split, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.files import replacing
from robustbench_deq.meter import Meter
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.protocol import frozen
from robustbench_deq.report.figures.plots import COLOURS, MARKERS, new_figure, save, style
from robustbench_deq.solvers import SOLVERS, Anderson, Broyden, CellMap, FixedPointMap, Solution, Solve
from robustbench_deq.solvers.base import residual_norms

TOLERANCES = (1e-3, 1e-6)
MAX_STEPS = 100
MAX_ROUNDS, SECONDS_A_PROBLEM = 50, 4.0
"""A problem's rounds: at least as many as asked for, and more of what is over in milliseconds."""
FREEZING_ROUNDS = 11
Run = Callable[[FixedPointMap, Tensor, float], tuple]
"""Solves from a start to a tolerance; the first of what it returns is the value."""


def ours(name: str) -> Run:
    return lambda fn, start, rtol: Solve(SOLVERS.get(name)(), rtol=rtol, max_steps=MAX_STEPS)(fn, start)


def theirs(name: str, max_iter: int, **settings: Any) -> Run:
    solver = get_solver(name)

    def run(fn: FixedPointMap, start: Tensor, rtol: float) -> tuple:
        try:
            return solver(fn, start, max_iter=max_iter, tol=rtol, stop_mode="rel", **settings)
        except torch.linalg.LinAlgError:  # it does not expect a singular system
            return (start,)

    return run


ITERATES, TERMS = Anderson().history_size + 1, Broyden().history_size
RIVALS = {  # its Broyden evaluates once before it counts
    "picard": {"torchdeq fixed_point_iter": theirs("fixed_point_iter", MAX_STEPS)},
    "anderson": {
        "torchdeq anderson": theirs("anderson", MAX_STEPS, m=ITERATES),
        "torchdeq anderson, lam 1e-8": theirs("anderson", MAX_STEPS, m=ITERATES, lam=1e-8),
    },
    "broyden": {
        "torchdeq broyden": theirs("broyden", MAX_STEPS - 1, LBFGS_thres=TERMS),
        "torchdeq broyden, all steps": theirs("broyden", MAX_STEPS - 1),
    },
}


class Problem(NamedTuple):
    """A fixed point to find. `build` makes a new map, so that a meter sees all of its evaluations."""

    model: EquilibriumModel
    build: Callable[[], FixedPointMap]
    start: Tensor


class Trial(NamedTuple):
    """How one solver did: counts per sample, the share of samples that are there, and the seconds of each round."""

    steps: float
    cell_evals: float
    cell_vjps: float
    reached: float
    worst_residual: float
    seconds: list[float]

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds)


def instances(pattern: str) -> dict[str, tuple[EquilibriumModel, str]]:
    """Names to models and the names of their data; the explicit twins are left out."""
    models = {name: load_model(name) for name in MODELS.list(pattern)}
    return {
        name: (model, describe_model(name).card.data or "digits")
        for name, model in models.items()
        if not model.is_explicit
    }


def problems(model: EquilibriumModel, data: Split) -> dict[str, Problem]:
    """The equilibrium of these images, and the adjoint of their cross-entropy there."""
    with torch.no_grad():
        u = model.inject(data.x)
        start = model.initial_state(u)
        tight = Solve(Anderson(ridge=1e-8), rtol=1e-7, max_steps=5 * MAX_STEPS)
        z = tight(CellMap(model.cell, u), start).value
    leaf = z.clone().requires_grad_()
    v = torch.autograd.grad(F.cross_entropy(model.head(leaf), data.y, reduction="sum"), leaf)[0]
    return {
        "forward": Problem(model, lambda: CellMap(model.evaluate, u), start),
        "adjoint": Problem(model, lambda: AdjointMap(model, z, u, v), v),
    }


def count(problem: Problem, run: Run, rtol: float) -> Trial:
    """One metered solve."""
    with Meter(problem.model) as meter:
        fn = problem.build()
        found = run(fn, problem.start, rtol)
    cost = meter.cost(len(problem.start))
    residual = residual_norms(found[0], fn(found[0]))[1].nan_to_num(torch.inf)
    steps = cost.cell_vjps or cost.cell_evals
    if isinstance(found, Solution):
        steps = float(found.num_steps.double().mean())
    reached = float((residual <= 1.01 * rtol).double().mean())  # 1%: rounding differs with the batch
    return Trial(steps, cost.cell_evals, cost.cell_vjps, reached, float(residual.max()), [])


def compete(problem: Problem, rtol: float, repeats: int) -> dict[str, Trial]:
    """All solvers on one problem, in turn; counting warms them up. Those without a rival take `repeats` rounds."""
    runs = {name: ours(name) for name in SOLVERS} | {
        label: run for rivals in RIVALS.values() for label, run in rivals.items()
    }
    trials = {label: count(problem, run, rtol) for label, run in runs.items()}
    rivals = [label for label in runs if label in RIVALS or label not in SOLVERS]
    fn = problem.build()
    begin = time.perf_counter()
    for turn in range(max(repeats, MAX_ROUNDS)):
        labels = list(runs) if turn < repeats else rivals
        if turn == repeats:
            begin = time.perf_counter()
        elif turn > repeats and time.perf_counter() - begin > SECONDS_A_PROBLEM:
            break
        for label in labels if turn % 2 else reversed(labels):
            start = time.perf_counter()
            runs[label](fn, problem.start, rtol)
            trials[label].seconds.append(time.perf_counter() - start)
    return trials


def ratio(slow: Trial, fast: Trial) -> Ratio:
    """Over the rounds in which both were timed."""
    rounds = min(len(slow.seconds), len(fast.seconds))
    return Ratio.of(slow.seconds[:rounds], fast.seconds[:rounds])


def best_of(trials: list[Trial]) -> Trial:
    """The fastest of those that brought the most samples there."""
    return min(trials, key=lambda trial: (-trial.reached, trial.milliseconds))


class Duel(NamedTuple):
    """One of ours beside the better variant of torchdeq's."""

    own: Trial
    rival: Trial
    ratio: Ratio

    def __str__(self) -> str:
        if self.own.reached == self.rival.reached:
            return str(self.ratio)
        return f"{self.ratio} (there: {self.own.reached:.1%}, torchdeq's {self.rival.reached:.1%})"


def duels(trials: dict[str, Trial]) -> dict[str, Duel]:
    """By method, and the best of both sides."""
    pairs = {
        method: (trials[method], best_of([trials[label] for label in rivals])) for method, rivals in RIVALS.items()
    }
    own = best_of([trials[name] for name in SOLVERS])
    pairs["best"] = own, best_of([trial for label, trial in trials.items() if label not in SOLVERS])
    return {title: Duel(own, rival, ratio(rival, own)) for title, (own, rival) in pairs.items()}


def facts_of(found: dict[str, dict[str, Duel]]) -> dict[str, Any]:
    """Of problems and their duels: who was slower where, among those where both brought the same samples there."""
    facts: dict[str, Any] = {}
    for title in [*RIVALS, "best"]:
        met = {where: by_title[title] for where, by_title in found.items()}
        even = {where: duel.ratio for where, duel in met.items() if duel.own.reached == duel.rival.reached}
        facts[title] = {
            "problems": len(met),
            "only ours reaches more samples": sum(duel.own.reached > duel.rival.reached for duel in met.values()),
            "only torchdeq reaches more samples": [
                where for where, duel in met.items() if duel.own.reached < duel.rival.reached
            ],
            "ours is slower": [f"{where}: {times}" for where, times in even.items() if times.high < 1.0],
            "cannot be told apart": [
                f"{where}: {times}" for where, times in even.items() if times.low <= 1 <= times.high
            ],
            "torchdeq / ours": _range([times.median for times in even.values()]),
        }
    return facts


def _range(medians: list[float]) -> str:
    return f"{min(medians):.2f} to {max(medians):.2f}, median {statistics.median(medians):.2f}" if medians else "none"


def batches(model: EquilibriumModel, pool: Split, size: int, rtol: float) -> dict[str, tuple[CellMap, Tensor]]:
    """Maps and starts of three batches: as they come, one eighth of the hardest, seven eighths already there."""
    with torch.no_grad():
        u = model.inject(pool.x)
        fn, start = CellMap(model.evaluate, u), model.initial_state(u)
    solution = Solve(Anderson(), rtol=rtol, max_steps=MAX_STEPS)(fn, start)
    order, few = solution.num_steps.argsort(stable=True), size // 8
    first, mixed = torch.arange(size), torch.cat([order[: size - few], order[-few:]])
    warm = start[:size].clone()
    warm[few:] = solution.value[few:size]
    return {
        "as they come": (fn.restrict(first), start[first]),
        "1/8 of the hardest, 7/8 of the easiest": (fn.restrict(mixed), start[mixed]),
        "1/8 cold, 7/8 at their equilibrium": (fn.restrict(first), warm),
    }


def freezing(model: EquilibriumModel, pool: Split, size: int, rtol: float, repeats: int) -> list[dict[str, Any]]:
    """With samples leaving the batch, and with all of them staying."""
    frozen_solve = Solve(Anderson(), rtol=rtol, max_steps=MAX_STEPS)
    together = frozen_solve.with_(compact_below=0.0)
    rows = []
    for label, (fn, start) in batches(model, pool, size, rtol).items():
        evals = []
        for solve in (frozen_solve, together):
            with Meter(model) as meter:
                solution = solve(fn, start)
            evals.append(round(meter.cost(size).cell_evals, 1))
        slow, fast, times = alternate(
            partial(together, fn, start), partial(frozen_solve, fn, start), max(repeats, FREEZING_ROUNDS)
        )
        rows.append(
            {
                "batch": label,
                "steps, mean": round(float(solution.num_steps.double().mean()), 1),
                "steps, most": int(solution.num_steps.max()),
                "cell evals, freezing": evals[0],
                "cell evals, all stay": evals[1],
                "ms, freezing": round(1e3 * fast, 2),
                "ms, all stay": round(1e3 * slow, 2),
                "all stay / freezing (ms)": str(times),
            }
        )
    return rows


def draw(points: pd.DataFrame, stem: str) -> None:
    """`results/NAME.png` and `.svg`: the milliseconds of every solver, hollow where some samples did not get there."""
    names = list(dict.fromkeys(points["model"]))
    labels = list(dict.fromkeys(points["solver"]))
    methods = list(SOLVERS)
    looks = {name: (COLOURS[index % len(COLOURS)], "o") for index, name in enumerate(methods)}
    for method, rivals in RIVALS.items():
        looks |= {label: (looks[method][0], marker) for label, marker in zip(rivals, MARKERS[1:], strict=False)}
    with style():
        figure = new_figure(11.0, 1.8 + 0.62 * len(names))
        grid = figure.subplots(1, 4, sharey=True)
        for axes, (direction, rtol) in zip(grid, itertools.product(("forward", "adjoint"), TOLERANCES), strict=True):
            part = points[(points["direction"] == direction) & (points["tolerance"] == f"{rtol:g}")]
            for point in part.itertuples():
                colour, marker = looks[point.solver]
                height = names.index(point.model) + 0.7 * (labels.index(point.solver) / len(labels) - 0.5)
                face = colour if point.reached == 1.0 else "none"
                axes.plot(point.ms, height, marker, color=colour, markerfacecolor=face, markersize=5)
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 3.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{direction}, {rtol:g}")
            axes.set_xlabel("ms a batch")
            axes.set_yticks(range(len(names)), names)
        grid[0].invert_yaxis()
        handles = [
            Line2D([], [], color=looks[label][0], marker=looks[label][1], linestyle="", label=label) for label in labels
        ]
        hollow = Line2D(
            [], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="not all reached"
        )
        figure.legend(handles=[*handles, hollow], loc="outside lower center", ncols=4)
    save(figure, RESULTS / stem)


@click.command()
@click.option("--models", "pattern", default="*", show_default=True, help="which registered models")
@click.option("--limit", default=128, show_default=True, help="images in a batch")
@click.option("--pool", default=1024, show_default=True, help="images from which the easy and the hard are picked")
@click.option("--repeats", default=7, show_default=True)
@click.option("--name", default="solves", show_default=True, help="of the files in results/")
def main(pattern: str, limit: int, pool: int, repeats: int, name: str) -> None:
    points, rows, freezes = [], [], []
    found: dict[str, dict[str, Duel]] = {}
    settings = {"batch": limit, "most evaluations": MAX_STEPS, "rounds, at least": repeats}
    for label, (model, source) in instances(pattern).items():
        data = load(source, limit=min(pool, len(load(source))))
        with frozen(model):
            for (direction, problem), rtol in itertools.product(
                problems(model, load(source, limit=limit)).items(), TOLERANCES
            ):
                trials = compete(problem, rtol, repeats)
                where = f"{label} {direction} {rtol:g}"
                found[where] = duels(trials)
                place = {"model": label, "direction": direction, "tolerance": f"{rtol:g}"}
                best = next(name for name in SOLVERS if trials[name] is found[where]["best"].own)
                rows.append(place | {"best of ours": best} | {title: str(duel) for title, duel in found[where].items()})
                for solver, trial in trials.items():
                    rounds = len(trial.seconds)
                    points.append(
                        {**place, "solver": solver, "ms": trial.milliseconds, "rounds": rounds} | trial._asdict()
                    )
                say(f"{where}: {rows[-1]}")
            for rtol in TOLERANCES:
                freezes += [
                    {"model": label, "tolerance": f"{rtol:g}", **row}
                    for row in freezing(model, data, limit, rtol, repeats)
                ]
        frame = pd.DataFrame(points).drop(columns="seconds")
        with replacing(RESULTS / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")
        draw(frame, name)
        keep(name, "torchdeq's time over ours at the same tolerance", rows, settings | facts_of(found))
        keep(f"{name}_all", "Every solver on every problem", [readable(point) for point in points], settings)
        keep(f"{name}_freezing", "Freezing on mixed batches, Anderson, forward", freezes, settings | {"pool": pool})


def readable(point: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of all solvers."""
    kept = {key: point[key] for key in ("model", "direction", "tolerance", "solver")}
    return kept | {
        "steps": f"{point['steps']:.1f}",
        "cell evals": f"{point['cell_evals']:.1f}",
        "VJPs": f"{point['cell_vjps']:.1f}",
        "there": f"{point['reached']:.1%}",
        "worst residual": f"{point['worst_residual']:.1e}",
        "ms": f"{point['ms']:.2f}",
        "rounds": point["rounds"],
    }


if __name__ == "__main__":
    main()
