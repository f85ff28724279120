"""The sum of absolute values. Both the projection and the steepest step see the pixel box.

Projection onto `{||d||_1 <= r, 0 <= x + d <= 1}` is exact: with `c_i` the room that pixel i has in the direction of
`delta_i`, the nearest feasible point is

    d_i = sign(delta_i) min(max(|delta_i| - t, 0), c_i),      t >= 0 the smallest with  sum_i |d_i| <= r,

and the sum falls piecewise linearly in t, with corners at `|delta_i|` and `|delta_i| - c_i`, so that t follows from
sorting them. Steepest ascent spends the length on the pixels of the largest gradient, each as far as the box lets it.

Source: Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021,
Propositions 2.1 and 2.2 (there the ascent is over the ball around zero; here over the box around the present point).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from robustbench_deq.optimise.domains.norm import TINY, Norm, add_norm
from robustbench_deq.rows import per_sample

FAR = 1e4
"""Entries beyond it are scaled down to it, where differences as small as a pixel can still be told apart; almost all of
the radius goes to the largest ones either way."""


@add_norm
class L1(Norm):
    name = "l1"

    def size(self, delta: Tensor) -> Tensor:
        return torch.linalg.vector_norm(delta.flatten(1), ord=1, dim=1)  # overflows only where the sum itself does

    def dual_size(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).abs().amax(1)

    def l2_reach(self, count: int) -> float:
        return 1.0

    def project(self, delta: Tensor, radius: Tensor | float, x: Tensor) -> Tensor:
        size, room = delta.flatten(1).abs(), _room(delta, x).flatten(1)
        size = size * (FAR / size.amax(1, keepdim=True).clamp_min(FAR))
        shift = _threshold(size, room, radius)
        kept = torch.minimum((size - shift[:, None]).clamp_min_(0.0), room)
        # The threshold is rounded, and many entries add up: rescaling takes off what that left beyond the radius.
        kept.mul_((radius / kept.sum(1).clamp_min(TINY)).clamp_max(1.0)[:, None])
        return kept.view_as(delta) * delta.sign()

    def direction(self, gradient: Tensor) -> Tensor:
        largest = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient / per_sample(largest, gradient)
        return gradient.div_(per_sample(self.size(gradient).clamp_min(TINY), gradient))

    def steepest(self, gradient: Tensor, length: Tensor | float, delta: Tensor, x: Tensor) -> Tensor:
        room = _room(gradient, x + delta).flatten(1)
        order = gradient.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
        wanted = room.gather(1, order)
        before = wanted.cumsum(1).sub_(wanted)
        left = (length[:, None] if isinstance(length, Tensor) else length) - before
        spent = torch.minimum(left.clamp_min_(0.0), wanted)
        return torch.zeros_like(room).scatter_(1, order, spent).view_as(gradient) * gradient.sign()

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray:
        size = stream.exponential(size=count + 1)  # the spare one makes the sum of the others uniform in the ball
        return stream.choice((-1.0, 1.0), count) * size[:-1] / size.sum()


def _room(towards: Tensor, x: Tensor) -> Tensor:
    """How far every pixel may go in the direction of `towards`."""
    return torch.where(towards > 0, 1.0 - x, x).clamp_min_(0.0)


def _threshold(size: Tensor, room: Tensor, radius: Tensor | float) -> Tensor:
    """The smallest t >= 0 with `sum_i min(max(size_i - t, 0), room_i) <= radius`, `(rows,)`; found in float64."""
    dtype, size, room = size.dtype, size.double(), room.double()
    limit = radius.double() if isinstance(radius, Tensor) else size.new_full((len(size),), radius)
    total = torch.minimum(size, room).sum(1)
    corners, order = torch.cat([(size - room).clamp_min(0.0), size], dim=1).sort(dim=1)
    change = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).gather(1, order)
    slope = change.cumsum(1)  # by how much the sum falls a unit of t beyond each corner
    steps = torch.diff(corners, dim=1, prepend=torch.zeros_like(corners[:, :1]))
    fallen = (steps[:, 1:] * slope[:, :-1]).cumsum(1)
    at_corner = total[:, None] - torch.cat([torch.zeros_like(fallen[:, :1]), fallen], dim=1)
    # The last corner at which the sum is still above the radius; beyond it the sum falls by `slope`.
    index = ((at_corner > limit[:, None]).sum(1, keepdim=True) - 1).clamp_min(0)
    here, falls = at_corner.gather(1, index), slope.gather(1, index).clamp_min(1.0)
    shift = corners.gather(1, index) + (here - limit[:, None]) / falls
    return torch.where(total <= limit, 0.0, shift[:, 0]).to(dtype)
