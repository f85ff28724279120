"""What rounding may add to images that users bring, and how to fix images and labels that are refused."""

from __future__ import annotations

from collections.abc import Sequence

PIXEL_SLACK = 1e-5
"""How far outside of [0, 1] a pixel may lie, as rounding leaves it after a resize or an undone normalisation. It is
clipped."""


def label_fix(shape: Sequence[int], num_samples: int) -> str:
    """How labels of this shape that are refused become one class index per image."""
    fix = "pass one class index per image"
    if tuple(shape) == (num_samples,):
        return f"{fix}: labels.long() of a tensor, labels.astype(int) of an array"
    if len(shape) == 2 and shape[0] == num_samples:
        return f"{fix}: labels.ravel()" if shape[1] == 1 else f"{fix}: labels.argmax(1) of one-hot rows"
    return fix


def shape_fix(got: Sequence[int], expected: Sequence[int]) -> str | None:
    """How images of shape `got` become images of `expected`, `(channels, height, width)`, if only axes are amiss."""
    channels, height, width = expected
    if tuple(got) == (height, width, channels):
        return (
            "the channels come last: images.transpose(0, 3, 1, 2) of an array, images.permute(0, 3, 1, 2) of a tensor"
        )
    return "add the axis of the channel: images[:, None]" if tuple(got) == (height, width) and channels == 1 else None
