"""Which intermediate state has the strongest gradient: the grid of `intermediate-pgd` as a heat map.

    robustbench-deq bench configs/suites/intermediate.yaml
    python -m benchmarks.intermediate

Robust accuracy under the gradient of state i after K_a damped steps (Yang, Pang, Liu, NeurIPS 2022), a panel for each
model and damping; beside it the ensemble over states and PGD with the equilibrium's own gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from benchmarks.timing import RESULTS, keep
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import load_records
from robustbench_deq.report.figures.plots import new_figure, save, style


def cells(records: list[Record]) -> pd.DataFrame:
    """A row a record of the grid: model, state, steps after it, damping, robust accuracy in percent."""
    rows = []
    for record in records:
        config: dict[str, Any] = record.attack_config
        if record.attack == "intermediate-pgd" and len(config["states"]) == 1:
            place = {"state": config["states"][0], "steps after": config["steps_after"], "damping": config["damping"]}
            rows.append({"model": record.model, **place, "robust %": round(100 * record.robust_accuracy, 1)})
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> None:
    """`results/intermediate.png` and `.svg`."""
    panels = list(frame.groupby(["model", "damping"], sort=False))
    with style():
        figure = new_figure(3.4 * len(panels), 3.1)
        for axes, ((model, damping), part) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
            table = part.pivot_table(index="state", columns="steps after", values="robust %")
            of_model = frame.loc[frame["model"] == model, "robust %"]
            low, high = of_model.min(), of_model.max()
            axes.imshow(table, cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
            for (row, column), value in np.ndenumerate(table.to_numpy()):
                is_dark = value > (low + high) / 2
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="w" if is_dark else "k")
            axes.set_xticks(range(len(table.columns)), table.columns)
            axes.set_yticks(range(len(table.index)), table.index)
            axes.grid(visible=False)
            axes.set_xlabel("Steps after the state")
            axes.set_ylabel("State")
            axes.set_title(f"{model}\ndamping {damping:g}", fontsize=9)
    save(figure, RESULTS / "intermediate")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/runs/intermediate"))
def main(folder: Path) -> None:
    records = load_records(folder)
    frame = cells(records)
    draw(frame)
    facts: dict[str, Any] = {}
    for record in records:
        if record.attack == "pgd" or len(record.attack_config["states"]) > 1:
            facts[f"{record.label} on {record.model}, robust %"] = round(100 * record.robust_accuracy, 1)
    threat, data = records[0].threat, records[0].data
    title = (
        f"Gradients of intermediate states, {threat.norm} {threat.epsilon:g}, {data.num_samples} {data.split} images"
    )
    keep("intermediate", title, frame.to_dict("records"), facts)


if __name__ == "__main__":
    main()
