"""What a GPU makes of the joint iteration: steps as captured graphs, attacks, and training steps, in two precisions.

    python -m benchmarks.gpu                              one large GPU, sized for an H200; no network
    python -m benchmarks.gpu --size small --device cpu    anywhere, in seconds; its figures mean nothing

Three parts, on `deq-conv` and the four-branch `mdeq`, with images of CIFAR-10's shape that are made up, and weights
that were trained on such images for a few batches:

- **Steps.** The bare work of a joint step (an evaluation of the cell, one vector-Jacobian product, injection and head),
  `augmented`, which adds the loss, and the whole step of `optimise()` with `Joint`: residuals, the kept iterate, the
  move, its projection. Each is run as it stands, with the cell by `torch.compile`, and both again as a CUDA graph. The
  whole step is a run of as many steps as `joint-pgd` takes; its graph holds all of them, with the schedule and the
  change of the loss. Nobody leaves the batch here: a graph has fixed shapes.
- **Attacks.** `joint-pgd` by default, and PGD-20 with full solves, cold and warm, on the same images with the same
  loss. The judge, in float32, has the last word whatever the attack computes in.
- **Training.** Standard and joint adversarial steps with the settings of `configs/training/`.

Works take turns, back and forth, the device idle before and after each; what counts is the median of the ratios within
a round. What this machine cannot do, or what there was no time for, is skipped, and its row says why. Nothing is begun
after `--seconds`, so that all of it should take less than eight minutes; nobody has run it on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import torch

from benchmarks.device import Clock, Precision, reason
from benchmarks.gpu_figure import draw
from benchmarks.gpu_parts import (
    SIZES,
    THREAT,
    TRAINING,
    Case,
    Row,
    measure_attacks,
    measure_steps,
    measure_training,
    trained,
)
from benchmarks.timing import RESULTS, Ratio, keep, say
from robustbench_deq.data import SplitName
from robustbench_deq.files import replacing
from robustbench_deq.report.tables.text import MISSING, amount, percent


def spread(row: Row, name: str) -> str:
    if pd.isna(row.get(f"{name} ratio")):
        return MISSING
    return str(Ratio(*(row[f"{name} {end}"] for end in ("ratio", "low", "high"))))


def cell(row: Row, name: str, show: Callable[[float], str], factor: float = 1.0) -> str:
    return MISSING if pd.isna(row.get(name)) else show(factor * row[name])


def step_cells(row: Row) -> Row:
    return {
        "what": row["what"],
        "how": row["how"],
        "ms a step": cell(row, "seconds", amount, 1e3),
        "times the bare work": spread(row, "bare"),
        "times faster than eager": spread(row, "eager"),
        "differs from eager": cell(row, "difference", "{:.0e}".format),
    }


def attack_cells(row: Row) -> Row:
    return {
        "what": row["what"],
        "seconds": cell(row, "seconds", amount),
        "times joint-pgd": spread(row, "joint"),
        "robust %": cell(row, "robust accuracy", percent),
        "clean %": cell(row, "clean accuracy", percent),
        "cell evals": cell(row, "cell evals", amount),
        "VJPs": cell(row, "cell VJPs", amount),
        "missed solves": cell(row, "missed solves", amount),
        "fallbacks": cell(row, "fallbacks", "{:.0f}".format),
        "unconverged": cell(row, "unconverged", "{:.0f}".format),
    }


def training_cells(row: Row) -> Row:
    return {
        "what": row["what"],
        "images a second": cell(row, "images a second", amount),
        "ms a batch": cell(row, "seconds", amount, 1e3),
        "times standard": spread(row, "standard"),
    }


SHOWN = {"steps": step_cells, "attacks": attack_cells, "training": training_cells}
PARTS = {"attacks": (measure_attacks, 0.35), "training": (measure_training, 0.15), "steps": (measure_steps, 0.5)}
"""In this order, with their shares of the time. Steps come last: they capture and compile, and what fails there may
leave the device unusable."""


def tables(rows: list[Row], cases: list[Row]) -> dict[str, list[Row]]:
    """The page: what was measured on, then a table a part."""
    shown: dict[str, list[Row]] = {}
    for row in rows:
        place = {"family": row["family"], "dtype": row["dtype"]}
        end = {"rounds": cell(row, "rounds", "{:.0f}".format), "note": row["note"] or MISSING}
        shown.setdefault(row["part"].capitalize(), []).append(place | SHOWN[row["part"]](row) | end)
    return {"": cases} | {heading: shown[heading] for heading in map(str.capitalize, SHOWN) if heading in shown}


def case_row(case: Case) -> Row:
    is_cuda = case.device.type == "cuda"
    with torch.no_grad():
        state = case.model.initial_state(case.model.inject(case.x[:1]))
    return {
        "device": torch.cuda.get_device_name(case.device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "family": case.family,
        "dtype": case.precision.value,
        "batch": len(case.x),
        "image": "x".join(map(str, case.size.images.shape)),
        "state": state.numel(),
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "weights": f"after {case.size.standard} standard and {case.size.adversarial} joint adversarial batches",
    }


def measured(cases: list[Case], seconds: float) -> Iterator[Row]:
    """All parts of all cases; a part that fails, or has no time, leaves a row that says so."""
    for part, (measure, share) in PARTS.items():
        for index, case in enumerate(cases):
            begin, left = time.perf_counter(), case.clock.left
            blank = {"part": part, **case.place, "what": "all", "how": MISSING}
            missing = case.precision.missing(case.device) or (None if left > 0 else "no time left")
            if missing is not None:
                yield blank | {"note": f"skipped: {missing}"}
                continue
            # Half of what is left goes into warming up.
            budget = min(left / (len(cases) - index), share * seconds / len(cases)) / 2
            try:
                yield from measure(case, budget)
            except RuntimeError as error:
                yield blank | {"note": f"failed: {reason(error)}"}
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
            say(f"{part}, {case}: {time.perf_counter() - begin:.0f} s, {case.clock.left:.0f} s left")


@click.command()
@click.option("--size", "size_name", type=click.Choice(list(SIZES)), default="full", show_default=True)
@click.option("--device", "device_name", default=None, help="cpu or cuda.  [default: cuda if there is one]")
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="of the cell; tf32 is one, too")
@click.option("--families", default=None, help="some of them, with commas.  [default: all of the size]")
@click.option("--batch-size", default=None, type=click.IntRange(1), help="[default: that of the size]")
@click.option("--seconds", default=380.0, show_default=True, help="when no more is begun; the last may take a minute")
@click.option("--compile/--no-compile", "compiles", default=None, help="[default: on CUDA]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="a folder")
def main(
    size_name: str,
    device_name: str | None,
    dtypes: str,
    families: str | None,
    batch_size: int | None,
    seconds: float,
    compiles: bool | None,
    out: Path,
) -> None:
    clock, begin = Clock(seconds), time.perf_counter()
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    compiles = device.type == "cuda" if compiles is None else compiles
    size = SIZES[size_name]
    if batch_size is not None:
        size = replace(size, batch=batch_size)
    precisions = [Precision(name) for name in dtypes.split(",")]
    names = families.split(",") if families else list(size.families)
    test = size.images.split(SplitName.TEST, size.batch, seed=3)
    x, y = test.x.to(device), test.y.to(device)
    cases = []
    for name in names:
        model = trained(name, size, device)
        say(f"trained {name}: {clock.left:.0f} s left")
        cases += [Case(name, precision, model, x, y, device, size, clock, compiles) for precision in precisions]
    rows = list(measured(cases, seconds))
    facts = {
        "threat": f"{THREAT.norm!r}, epsilon {THREAT.epsilon:.4f}",
        "images": size.images._asdict(),
        "steps of a run": size.steps,
        "training settings": str(TRAINING),
        "float32": "without TF32, in the judge too",
        "seconds in all": round(time.perf_counter() - begin, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "gpu.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g")
    draw(rows, out / "gpu")
    title = f"The joint iteration on {device.type}, size {size_name}"
    keep("gpu", title, rows, facts, tables=tables(rows, [case_row(case) for case in cases]), device=device, folder=out)


if __name__ == "__main__":
    main()
