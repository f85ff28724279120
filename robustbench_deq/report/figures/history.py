"""The plot of a training run: loss, and clean and robust validation accuracy, against epochs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter

from robustbench_deq.report.figures.plots import COLOURS, MARKERS, new_figure, save, style


def plot_history(history: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `history.png` and `history.svg` to `folder`.

    Args:
        history: a row an epoch, with `epoch`, `train_loss`, `clean_accuracy` and `robust_accuracy` (may be empty).
    """
    with style():
        figure = new_figure(8.0, 3.4)
        left, right = figure.subplots(1, 2)
        left.plot(history["epoch"], history["train_loss"], color=COLOURS[0], marker=MARKERS[0])
        left.set(xlabel="Epoch", ylabel="Training cross-entropy (nats)")
        columns = (("clean_accuracy", "clean"), ("robust_accuracy", "robust"))
        for (column, label), colour, marker in zip(columns, COLOURS, MARKERS, strict=False):
            values = pd.to_numeric(history[column])
            if values.notna().any():
                right.plot(history["epoch"], values, color=colour, marker=marker, label=label)
        right.set(xlabel="Epoch", ylabel="Validation accuracy")
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.legend(loc="best")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return save(figure, folder / "history")
