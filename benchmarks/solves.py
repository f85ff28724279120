"""Equilibrium solves: every registered solver on every family, forward and adjoint, beside torchdeq's own.

    python -m benchmarks.solves

Every solver gets the same cell, images, start and most evaluations, and stops at the same relative residual
`||f(z) - z|| / ||f(z)||`: ours each sample by itself, torchdeq's when the last sample is there. What they return is
measured once more by us. The memory is the same: torchdeq's Anderson counts iterates (6), ours their differences (5);
Broyden's terms are 30. torchdeq's variants are those that favour it: a smaller ridge (its own is absolute), and a
memory of all steps, which is its default. A problem's solvers take turns, back and forth, and medians of the ratios
within a round count.

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

from benchmarks.timing import RESULTS, alternate, keep, say
from robustbench_deq.adjoints import AdjointMap
from robustbench_deq.attack import frozen
from robustbench_deq.data import Split, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.files import replacing
from robustbench_deq.meter import Meter
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.report.plots import COLOURS, MARKERS, new_figure, save, style
from robustbench_deq.solvers import SOLVERS, Anderson, Broyden, CellMap, FixedPointMap, Solution, Solve
from robustbench_deq.solvers.base import residual_norms

TOLERANCES = (1e-3, 1e-6)
MAX_STEPS = 100
MAX_ROUNDS, SECONDS_A_PROBLEM = 50, 3.0
"""What is over in milliseconds is timed more often than asked for: a single hiccup would decide."""
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
    """A fixed point to find. `build` makes the map anew, so that a meter sees all of its evaluations."""

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

    def __str__(self) -> str:
        share = "" if self.reached == 1.0 else f", {self.reached:.1%} reached"
        return f"{self.steps:.1f} steps, {1e3 * statistics.median(self.seconds):.2f} ms{share}"


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
    """All solvers on one problem, in turn."""
    runs = {name: ours(name) for name in SOLVERS} | {
        label: run for rivals in RIVALS.values() for label, run in rivals.items()
    }
    trials = {label: count(problem, run, rtol) for label, run in runs.items()}
    fn = problem.build()
    begin = time.perf_counter()
    for turn in range(max(repeats, MAX_ROUNDS) + 1):  # the first round warms up
        if turn > repeats and time.perf_counter() - begin > SECONDS_A_PROBLEM:
            break
        for label in list(trials) if turn % 2 else reversed(trials):
            start = time.perf_counter()
            runs[label](fn, problem.start, rtol)
            if turn:
                trials[label].seconds.append(time.perf_counter() - start)
    return trials


def ratio(slow: Trial, fast: Trial) -> float:
    """Median over the rounds of how many times longer `slow` took."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def best_of(trials: list[Trial]) -> Trial:
    """The fastest of those that brought the most samples there."""
    return min(trials, key=lambda trial: (-trial.reached, statistics.median(trial.seconds)))


def summarise(trials: dict[str, Trial]) -> dict[str, Any]:
    """Each method beside the better variant of torchdeq's, and the best solver of both sides."""
    row: dict[str, Any] = {}
    for method, rivals in RIVALS.items():
        rival = best_of([trials[label] for label in rivals])
        row |= {
            method: str(trials[method]),
            f"torchdeq {method}": str(rival),
            f"torchdeq / ours, {method}": round(ratio(rival, trials[method]), 2),
            f"reached, {method}": [trials[method].reached, rival.reached],
        }
    own = best_of([trials[name] for name in SOLVERS])
    rival = best_of([trial for label, trial in trials.items() if label not in SOLVERS])
    name = next(label for label, trial in trials.items() if trial is own)
    return row | {
        "best of ours": f"{name}: {own}",
        "best of torchdeq / best of ours": round(ratio(rival, own), 2),
        "reached, best": [own.reached, rival.reached],
    }


def facts_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Who was slower where, among the problems on which both sides brought the same samples there."""
    facts: dict[str, Any] = {}
    keys = {method: f"torchdeq / ours, {method}" for method in RIVALS} | {"best": "best of torchdeq / best of ours"}
    for title, key in keys.items():
        reached = [row[f"reached, {title}"] for row in rows]
        even = [row for row, (own, rival) in zip(rows, reached, strict=True) if own == rival]
        facts[title] = {
            "problems": len(rows),
            "only ours reaches more samples": sum(own > rival for own, rival in reached),
            "only torchdeq reaches more samples": [
                where(row) for row, (own, rival) in zip(rows, reached, strict=True) if own < rival
            ],
            "ours is slower": [f"{where(row)}: {row[key]}" for row in even if row[key] < 1.0],
            "median of torchdeq / ours": round(statistics.median(row[key] for row in even), 2) if even else None,
        }
    return facts


def where(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['direction']} {row['tolerance']:g}"


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
        slow, fast, times = alternate(partial(together, fn, start), partial(frozen_solve, fn, start), repeats)
        rows.append(
            {
                "batch": label,
                "steps, mean": round(float(solution.num_steps.double().mean()), 1),
                "steps, most": int(solution.num_steps.max()),
                "cell evals, freezing": evals[0],
                "cell evals, all stay": evals[1],
                "ms, freezing": round(1e3 * fast, 2),
                "ms, all stay": round(1e3 * slow, 2),
                "all stay / freezing (ms)": round(times, 2),
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
            part = points[(points["direction"] == direction) & (points["tolerance"] == rtol)]
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
    settings = {"batch": limit, "most evaluations": MAX_STEPS, "rounds": repeats}
    for label, (model, source) in instances(pattern).items():
        data = load(source, limit=min(pool, len(load(source))))
        with frozen(model):
            for (direction, problem), rtol in itertools.product(
                problems(model, load(source, limit=limit)).items(), TOLERANCES
            ):
                trials = compete(problem, rtol, repeats)
                place = {"model": label, "direction": direction, "tolerance": rtol}
                rows.append(place | summarise(trials))
                for solver, trial in trials.items():
                    milliseconds = 1e3 * statistics.median(trial.seconds)
                    points.append({**place, "solver": solver, "ms": milliseconds, **trial._asdict()})
                say(f"{where(place)}: {rows[-1]['best of ours']}")
            for rtol in TOLERANCES:
                freezes += [
                    {"model": label, "tolerance": rtol, **row} for row in freezing(model, data, limit, rtol, repeats)
                ]
        frame = pd.DataFrame(points).drop(columns="seconds")
        with replacing(RESULTS / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")
        draw(frame, name)
        shown = [{key: value for key, value in row.items() if not key.startswith("reached")} for row in rows]
        keep(name, "Equilibrium solves beside torchdeq's", shown, settings | facts_of(rows))
        keep(f"{name}_freezing", "Freezing on mixed batches, Anderson, forward", freezes, settings | {"pool": pool})


if __name__ == "__main__":
    main()
