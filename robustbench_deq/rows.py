"""Tensors whose first axis is the batch: how a number a sample meets them."""

from __future__ import annotations

from torch import Tensor


def per_sample(vector: Tensor, like: Tensor) -> Tensor:
    """Reshape `(batch,)` to `(batch, 1, ..., 1)` so that it broadcasts against `like`."""
    return vector.view(-1, *[1] * (like.dim() - 1))
