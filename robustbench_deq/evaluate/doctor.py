"""The doctor: does a model keep the contract that attacks and judge rely on?

Every check gives a finding: what came out, whether that is well, and how to fix it if not. Whatever a model's own code
raises becomes a finding too. The first four look at the parts at a state near the initial one, the others at the
equilibria that the judge finds. A check that depends on one whose finding is bad is left out, and a note says so: one
cause is reported once.

    parts          inject, initial_state, cell and head give finite tensors of the right shapes
    deterministic  a second call gives the same, whatever came in between
    modes          train mode changes no part
    batch          no part lets the rows of a batch interact
    equilibrium    the judge finds one for every image
    gradient       the implicit gradient through inject, cell and head is that of central finite differences, on the
                   images whose adjoint and shifted equilibria are found to the judge's tolerance
    forward        forward has the equilibrium's logits, and in eval mode its gradient with respect to the image; most
                   predictions are the same, and the logits no further off than their own size
    accuracy       better than naming the commonest class, and not better still for pixels of another range
    contraction    spectral radius of J_z, and steps of the plain iteration
    solver         the one of the fewest cell evaluations; where none is quick, those that the judge needed
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.data import Split
from robustbench_deq.equilibrium import EquilibriumModel, check_labels
from robustbench_deq.errors import told
from robustbench_deq.evaluate.batch import check_split
from robustbench_deq.evaluate.judge import JUDGE_RTOL, LADDER, is_readable, tight_solve
from robustbench_deq.evaluate.measures import (
    FINE,
    NUM_DIFFERENTIATED,
    Case,
    batch_gap,
    gradient_gap,
    gradient_of,
    implicit_score,
    outputs,
    relative_gap,
    repeat_gap,
    score,
    worst_gap,
)
from robustbench_deq.meter import Meter
from robustbench_deq.models.diagnostics import picard_solution, spectral_radius
from robustbench_deq.optimise import estimate_contraction
from robustbench_deq.protocol import frozen
from robustbench_deq.solvers import SOLVERS, CellMap, Solve, Status
from robustbench_deq.trial import PartError, try_parts

NUM_IMAGES = 32
QUICK_RTOL, QUICK_STEPS = 1e-3, 100
RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "from -1 to 1": lambda x: 2 * x - 1,
    "from 0 to 255": lambda x: 255 * x,
    "of mean 0 and deviation 1": lambda x: (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), keepdim=True),
}


HOW_SOLVES_END = {
    Status.MAX_STEPS: "ran out of steps",
    Status.DIVERGED: "diverged",
    Status.NONFINITE: "met NaN or infinity",
}


class Grade(enum.Enum):
    GOOD = "good"
    NOTE = "note"
    BAD = "bad"


class Finding(NamedTuple):
    """What a check found, how well that is, and how to fix it. `check`, its name, is filled in by `examine`."""

    grade: Grade
    found: str
    fix: str = ""
    check: str = ""

    @property
    def is_bad(self) -> bool:
        return self.grade is Grade.BAD


def examine(model: EquilibriumModel, data: Split) -> list[Finding]:
    """The findings on `model` from the first images of `data`, in the order above; the model is left as it was.

    Every check has one; what rests on one that is bad is a note that says which to fix first.

    Raises:
        UsageError: for data that are no `Split`, and images or labels that do not fit the model.
    """
    check_split(data)
    rest = (*NEAR_THE_START, "equilibrium", *AT_EQUILIBRIA)
    missing = [name for name in ("input_shape", "num_classes") if not hasattr(model, name)]
    if missing:
        found = Finding(Grade.BAD, f"no {' and no '.join(missing)}", "set them in the model's __init__", "parts")
        return [found, *(_left_out(check, "parts") for check in rest)]
    x = data.x[:NUM_IMAGES]
    model.check_images(x)
    x, y = x.clamp(0.0, 1.0), check_labels(data.y[:NUM_IMAGES], len(x), model.num_classes)
    with frozen(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        findings = [_parts(model, x)._replace(check="parts")]
        if findings[0].is_bad:
            return [*findings, *(_left_out(check, "parts") for check in rest)]
        case = Case.near_the_start(model, x, y)
        for check, look in NEAR_THE_START.items():
            findings.append(_finding(check, look, case, findings))
        settled: list[Case] = []
        findings.append(_finding("equilibrium", functools.partial(_equilibrium, settled=settled), case, findings))
        for check, look in AT_EQUILIBRIA.items():
            if settled:
                findings.append(_finding(check, look, settled[0], findings))
            else:
                findings.append(_left_out(check, _ground("equilibrium", findings) or "equilibrium"))
        return findings


def _ground(check: str, findings: Sequence[Finding]) -> str | None:
    """The first bad one that `check` rests on."""
    bad = {finding.check for finding in findings if finding.is_bad}
    return next((name for name in RESTS_ON.get(check, ()) if name in bad), None)


def _left_out(check: str, ground: str) -> Finding:
    return Finding(Grade.NOTE, "not examined", f"fix {ground} first", check)


def _finding(check: str, look: Callable[[Case], Finding], case: Case, before: Sequence[Finding]) -> Finding:
    ground = _ground(check, before)
    if ground is not None:
        return _left_out(check, ground)
    try:
        return look(case)._replace(check=check)
    except Exception as error:  # whatever a foreign model raises
        return Finding(Grade.BAD, f"raises {told(error)}", "correct the model", check)


def _parts(model: EquilibriumModel, x: Tensor) -> Finding:
    try:
        tried = try_parts(model, x)
    except PartError as error:
        return Finding(Grade.BAD, error.found, error.fix)
    for name, output in tried._asdict().items():
        is_good = is_readable(output) if name == "head" else torch.isfinite(output)
        if not bool(is_good.all()):
            return Finding(Grade.BAD, f"{name} gives NaN or infinity", f"look at {name} and at the weights")
    return Finding(Grade.GOOD, f"state {tuple(tried.cell.shape)}, logits {tuple(tried.head.shape)}")


def _percent(gap: float) -> str:
    return f"{gap:.1%}" if gap <= 1.0 else "more than 100%"


def _deterministic(case: Case) -> Finding:
    name, gap = repeat_gap(case)
    if gap == 0.0:
        return Finding(Grade.GOOD, "a second call agrees to the bit")
    if gap < 1e-4:
        return Finding(Grade.NOTE, f"{name} differs by {gap:.0e} in a second call", "harmless, if it is rounding")
    fix = f"draw nothing at random and keep nothing between calls in {name}"
    return Finding(Grade.BAD, f"{name} differs by {_percent(gap)} in a second call", fix)


def _modes(case: Case) -> Finding:
    plain = outputs(case)
    with frozen(case.model):
        case.model.train()
        name, gap = worst_gap(plain, outputs(case))
    if gap < 1e-4:
        return Finding(Grade.GOOD, "train and eval mode agree")
    fix = "attacks use eval mode; better group norm than batch norm, and one dropout mask for a whole solve"
    return Finding(Grade.NOTE, f"train mode changes {name} by {_percent(gap)}", fix)


def _batch(case: Case) -> Finding:
    if len(case.x) == 1:
        return Finding(Grade.NOTE, "one image has no batch mates", "check on more data")
    name, gap = batch_gap(case)
    if gap < 1e-4:
        return Finding(Grade.GOOD, "rows do not interact")
    return Finding(
        Grade.BAD, f"batch mates change {name} by {_percent(gap)}", f"normalise within each sample in {name}"
    )


def _equilibrium(case: Case, settled: list[Case]) -> Finding:
    """Appends to `settled` the case of the images that have an equilibrium, at it, if there are any."""
    try:
        solution = tight_solve(case.model, case.u)
    except Exception as error:  # whatever a foreign cell raises
        found = f"the judge's solve raises {told(error)}"
        return Finding(Grade.BAD, found, "let cell take any batch and any state")
    num_images, num_found = len(solution.status), int(solution.is_converged.sum())
    if num_found:
        settled.append(case._replace(z=solution.value).at(solution.is_converged))
    if num_found == num_images:
        return Finding(Grade.GOOD, f"the judge finds one for all {num_images} images")
    counts = collections.Counter(Status(int(code)) for code in solution.status[~solution.is_converged])
    ends = ", ".join(f"{HOW_SOLVES_END[status]} on {count}" for status, count in counts.items())
    return Finding(
        Grade.BAD,
        f"the judge finds one for {num_found} of {num_images} images (its solvers {ends})",
        "the others are never robust: make the cell contract (normalise its output, shrink or regularise its Jacobian)",
    )


def _gradient(case: Case) -> Finding:
    fix = "use differentiable operations alone in inject, cell and head: no detach, no_grad, rounding or .data"
    is_missing, gap, num_found, num_images = gradient_gap(case)
    if is_missing:
        return Finding(Grade.BAD, "none reaches the image", fix)
    where = ""
    if num_found < num_images:
        where = f" on the {num_found} of {num_images} images whose solves reach {JUDGE_RTOL:g}"
    slow = f"{FINE.max_steps} steps of Anderson are too few elsewhere: make the cell contract more"
    if not num_found:
        return Finding(Grade.NOTE, f"not judged: its solves reach {JUDGE_RTOL:g} on none of {num_images} images", slow)
    if gap >= 0.05:
        return Finding(Grade.BAD, f"finite differences differ by {gap:.0%}{where}", fix)
    if where:
        return Finding(Grade.NOTE, f"finite differences agree to {gap:.1%}{where}", slow)
    return Finding(Grade.GOOD, f"finite differences agree to {gap:.1%}")


def _forward(case: Case) -> Finding:
    logits = case.model(case.x)
    if not bool(is_readable(logits).all()):
        return Finding(Grade.BAD, "forward gives NaN or infinity", "look at model.solve")
    few = case.at(torch.arange(len(case.x))[:NUM_DIFFERENTIATED])
    gradient = gradient_of(lambda x: score(case.model(x)), few.x)
    if not bool(gradient.any()):
        fix = "do not detach the state in eval mode: leave forward to EquilibriumModel"
        return Finding(Grade.BAD, "no gradient in eval mode", fix)
    expected = case.model.head(case.z)
    gap = relative_gap(expected, logits)
    num_other = int((expected.argmax(1) != logits.argmax(1)).sum())
    exact = gradient_of(lambda x: implicit_score(few, x), few.x)
    cosine = float(F.cosine_similarity(gradient.flatten(1), exact.flatten(1)).median())
    found = f"logits {_percent(gap)} off the equilibrium's, gradients at a cosine of {cosine:.2f}"
    if gap < 0.05 and cosine > 0.9:
        return Finding(Grade.GOOD, found)
    if gap > 1.0 or num_other > len(case.x) / 2:
        found = f"another model: {num_other} of {len(case.x)} predictions are not the equilibrium's; {found}"
        fix = "leave forward to EquilibriumModel; give model.solve another solver or more steps, or make cell contract"
        return Finding(Grade.BAD, found, fix)
    return Finding(Grade.NOTE, found, "what calls forward sees another model: tighten model.solve and model.adjoint")


def _accuracy(case: Case) -> Finding:
    num_images = len(case.y)
    share = _share(case.model.head(case.z), case.y)
    commonest = float(case.y.bincount().max()) / num_images
    chance = commonest + 3 * (commonest * (1 - commonest) / num_images) ** 0.5
    others = {}
    for name, change in RANGES.items():
        with contextlib.suppress(Exception):  # a model may well refuse such pixels
            others[name] = _share(case.model(change(case.x)), case.y)
    best = max(others.values(), default=0.0)
    found = f"{share:.0%} of {num_images} images"
    if best > max(chance, share + 0.2):
        names = " or ".join(name for name, other in others.items() if other == best)
        fix = f"images come in [0, 1]: let inject bring them to pixels {names}"
        return Finding(Grade.BAD, f"{found}, but {best:.0%} for pixels {names}", fix)
    if share > chance:
        return Finding(Grade.GOOD, found)
    found += f"; the commonest class has {commonest:.0%}"
    return Finding(Grade.NOTE, found, "train it, normalise as in training, or check on more images")


def _share(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def _contraction(case: Case) -> Finding:
    radius = spectral_radius(case.model, case.z, case.u)
    plain = picard_solution(case.model, case.x, rtol=QUICK_RTOL, max_steps=QUICK_STEPS)
    share = float(plain.is_converged.double().mean())
    found = f"spectral radius {float(radius.median()):.2f}, at most {float(radius.max()):.2f}; plain iteration "
    if share == 1.0:
        found += f"takes {float(plain.num_steps.double().median()):.0f} steps to {QUICK_RTOL:g}"
    else:
        found += f"reaches {QUICK_RTOL:g} in {QUICK_STEPS} steps on {share:.0%} of the images"
    contraction = estimate_contraction(case.model, case.z, case.u, case.z - case.model.initial_state(case.u))
    num_slow, num_hard = int((contraction.relaxation > 1.0).sum()), int(contraction.is_hard.sum())
    what = []
    if num_slow:
        factor = float(contraction.relaxation[contraction.relaxation > 1.0].median())
        what.append(f"relaxes the states of {num_slow} of {len(case.x)} images, by {factor:.2g} in the median")
    if num_hard:
        what.append(f"audits the {num_hard} of {len(case.x)} that are hard with full solves, and may finish with them")
    plan = f"joint-pgd {', '.join(what)}" if what else ""
    if share == 1.0 and float(radius.max()) < 1.0 and not num_hard:
        return Finding(Grade.GOOD, found, plan)
    return Finding(Grade.NOTE, found, f"{plan or 'joint-pgd takes it as it is'}; Jacobian regularisation helps")


def _solver(case: Case) -> Finding:
    ranking, raising = [], {}
    for name in SOLVERS:
        solver = SOLVERS.get(name)()
        num_steps = max(1, QUICK_STEPS // (1 + getattr(solver, "krylov_size", 0)))  # at about equal cost
        solve = Solve(solver, rtol=QUICK_RTOL, max_steps=num_steps)
        with Meter(case.model) as meter:
            try:
                solution = solve(CellMap(case.model.evaluate, case.u), case.model.initial_state(case.u))
            except Exception as error:  # whatever a foreign cell raises
                raising[name] = told(error)
                continue
        num_left = int((~solution.is_converged).sum())
        ranking.append((num_left, meter.eval_rows / len(case.u), name))
    if not ranking:
        return Finding(Grade.BAD, f"every solver raises; {next(iter(raising.values()))}", "correct cell")
    ranking.sort()
    num_left, _, best = ranking[0]
    if num_left:
        missed = ", ".join(f"{name} {left}" for left, _, name in ranking)
        found = f"none reaches {QUICK_RTOL:g} in {QUICK_STEPS} evaluations on every image (missed: {missed}); "
        fix = "allow as many steps in --set max_steps=... of pgd and in model.solve, or make the cell contract more"
        return Finding(Grade.NOTE, f"{found}the judge needs {_rungs_needed(case)}", fix)
    listed = ", ".join(f"{name} {count:.0f}" for left, count, name in ranking if not left)
    found = f"use {best}; cell evaluations an image to {QUICK_RTOL:g}: {listed}"
    if raising:
        fix = "the judge may need it: let cell take any batch and any state"
        return Finding(Grade.NOTE, f"{found}; {', '.join(raising)} raises", fix)
    fix = f"choose it by --set solver={best} of pgd, and by model.solve = Solve(SOLVERS.get({best!r})())"
    return Finding(Grade.GOOD, found, fix)


def _rungs_needed(case: Case) -> str:
    """Which of the judge's solvers find the equilibria of the case's images, each from where those before ended, and
    their most steps."""
    start, left, needed = case.model.initial_state(case.u), torch.arange(len(case.x), device=case.x.device), []
    for rung in LADDER:
        solution = rung(CellMap(case.model.evaluate, case.u[left]), start)
        if num_found := int(solution.is_converged.sum()):
            most = int(solution.num_steps[solution.is_converged].max())
            needed.append(f"{type(rung.solver).__name__} on {num_found} images (up to {most} steps)")
        is_left = ~solution.is_converged
        left, start = left[is_left], solution.value[is_left]
        if not len(left):
            break
    return ", ".join(needed)


NEAR_THE_START = {"deterministic": _deterministic, "modes": _modes, "batch": _batch}
AT_EQUILIBRIA = {
    "gradient": _gradient,
    "forward": _forward,
    "accuracy": _accuracy,
    "contraction": _contraction,
    "solver": _solver,
}
RESTS_ON = {
    "modes": ("deterministic",),
    "batch": ("deterministic",),
    "equilibrium": ("deterministic", "batch"),
    "forward": ("gradient",),
    "accuracy": ("forward",),
}
"""Checks to those that they rest on; all rest on parts, and those at equilibria on there being one."""
