"""Gallery: clean image, perturbation and adversarial image side by side, with what the model said of each.

A perturbation is drawn around mid-grey and stretched so that its largest entry spans the scale; that entry is printed
above it. Images are `(channels, height, width)` in [0, 1] with one or three channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustbench_deq.errors import UsageError
from robustbench_deq.report.figures.plots import new_figure, plain, style
from robustbench_deq.report.supplements import GalleryRow

ROWS_BESIDE = 2
TINY = 1e-12


def stretched(perturbation: np.ndarray) -> np.ndarray:
    """A perturbation as an image in [0, 1]: mid-grey is no change, and the largest entry spans the scale."""
    return 0.5 + perturbation / (2 * max(float(np.abs(perturbation).max()), TINY))


def draw_gallery(rows: Sequence[GalleryRow]) -> Figure:
    """A grid of images, a sample a row and two samples beside each other. Raises `UsageError` when there are none."""
    if not rows:
        raise UsageError.of("gallery", expected="at least one sample", got="none", fix="leave the gallery out")
    beside = min(ROWS_BESIDE, len(rows))
    high = math.ceil(len(rows) / beside)
    with style():
        figure = new_figure(4.2 * beside, 1.85 * high)
        for index, part in enumerate(np.ravel(figure.subfigures(high, beside, squeeze=False))[: len(rows)]):
            row = rows[index]
            scale = float(np.abs(row.perturbation).max())
            left, middle, right = part.subplots(1, 3)
            _draw(left, row.clean, f"true {row.label}\nread as {row.clean_prediction}")
            _draw(middle, stretched(row.perturbation), f"perturbation\nlargest {scale:.3f}")
            is_fooled = row.adversarial_prediction != row.label
            _draw(right, row.adversarial, f"adversarial\nread as {row.adversarial_prediction}", is_bold=is_fooled)
    return figure


def _draw(axes: Axes, image: np.ndarray, title: str, *, is_bold: bool = False) -> None:
    pixels = np.clip(np.moveaxis(np.asarray(image, dtype=float), 0, -1), 0.0, 1.0)
    axes.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_title(plain(title), fontsize=8.5, fontweight="bold" if is_bold else "normal")
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
