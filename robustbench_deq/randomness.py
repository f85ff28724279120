"""Random numbers keyed by (seed, row's number, counter): what a row draws depends on neither its batch nor its device.

Each entry hashes its key and place by the finaliser of SplitMix64, in tensors, without work a row in Python:

    s_j = mix(k + (j + 1) phi),      mix(s): s ^= s >> 30; s *= a; s ^= s >> 27; s *= b; s ^= s >> 31

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64); Box and Muller,
1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The lowest 64 bits as torch's signed integers hold them."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


_PHI, _A, _B = (_signed(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def keyed_normal(like: Tensor, seed: int, ids: Tensor, counter: int) -> Tensor:
    """Standard normal numbers of the shape and type of `like` `(rows, ...)`.

    Args:
        ids: a number a row, `(rows,)`.
        counter: tells the draws of one row apart.
    """
    count = like[0].numel()
    key = _mix(
        ids.to(like.device, torch.int64) + _mix(torch.tensor(seed, device=like.device) + _PHI) + _signed(counter * _PHI)
    )
    place = torch.arange(1, 2 * count + 1, device=like.device) * _PHI
    bits = _mix(key[:, None] + place)
    uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)  # strictly between 0 and 1
    radius = uniform[:, :count].log_().mul_(-2.0).sqrt_()
    return (radius * (2 * math.pi * uniform[:, count:]).cos_()).to(like.dtype).view_as(like)


def keyed_uniform(ids: Tensor, seed: int, counter: int) -> Tensor:
    """One number a row `(rows,)`, uniform in (0, 1), of double precision.

    Args:
        ids, counter: as those of `keyed_normal`.
    """
    start = _mix(torch.tensor(seed, device=ids.device) + _PHI) + _signed(counter * _PHI)
    bits = _mix(_mix(ids.to(torch.int64) + start) + _PHI)
    return ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)


def _mix(state: Tensor) -> Tensor:
    """A bijection of 64 bits that leaves no pattern."""
    state = (state ^ _shifted(state, 30)) * _A
    state = (state ^ _shifted(state, 27)) * _B
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, count: int) -> Tensor:
    """The bits moved down, zeros moving in."""
    return (state >> count) & (2 ** (64 - count) - 1)
