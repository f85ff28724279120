"""Perturbations of images: a norm ball whose radius may differ from row to row, cut by the pixel box [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from robustbench_deq.optimise.domains.base import Domain
from robustbench_deq.optimise.domains.norm import Norm
from robustbench_deq.shown import briefly_shown


@briefly_shown
@dataclass(frozen=True)
class Ball(Domain):
    """`{delta : ||delta||_p <= radius, 0 <= x + delta <= 1}` around images x `(rows, channels, height, width)`.

    Args:
        norm: of the perturbation.
        radius: `(rows,)`, or one number for all.
        x: the images in [0, 1].
    """

    norm: Norm
    radius: Tensor | float
    x: Tensor

    def project(self, variable: Tensor) -> Tensor:
        return self.norm.project(variable, self.radius, self.x)

    def direction(self, gradient: Tensor) -> Tensor:
        return self.norm.direction(gradient)

    def steepest(self, gradient: Tensor, length: Tensor | float, variable: Tensor) -> Tensor:
        return self.norm.steepest(gradient, length, variable, self.x)

    def with_radius(self, radius: Tensor) -> Ball:
        """The ball of another radius `(rows,)`."""
        return replace(self, radius=radius)

    def take(self, rows: Tensor) -> Self:
        radius = self.radius[rows] if isinstance(self.radius, Tensor) else self.radius
        return replace(self, radius=radius, x=self.x[rows])

    def random_start(self, seed: int, sample_ids: Tensor, restart: int = 0) -> Tensor:
        """A point drawn uniformly from the ball (then cut by the box), one stream per `(seed, restart, sample id)`.

        The draw of a sample does not depend on the batch it is in.

        Args:
            sample_ids: a number >= 0 a row, `(rows,)`.

        Raises:
            ValueError: for another number of ids than of rows.
        """
        rows = np.empty((len(self.x), self.x[0].numel()))
        for row, sample_id in zip(rows, sample_ids.tolist(), strict=True):
            stream = np.random.Generator(np.random.Philox(key=[_stream_key(seed, restart), sample_id]))
            row[:] = self.norm.draw(stream, len(row))
        radius = self.radius if isinstance(self.radius, Tensor) else torch.full((len(self.x),), float(self.radius))
        delta = torch.from_numpy(rows) * radius.double().cpu()[:, None]
        return self.project(delta.to(self.x).view_as(self.x))


def _stream_key(seed: int, restart: int) -> int:
    return int(np.random.SeedSequence([seed, restart]).generate_state(1, np.uint64)[0])
