"""Newton-Krylov: Newton's method on `z - f(z) = 0` with batched GMRES on Jacobian-vector products.

    (I - J_f(z)) s = f(z) - z,      z' = z + t s

GMRES minimises the residual over a Krylov space per sample (`krylov`). The step length t is found by backtracking over
the loop's own evaluations: a step that did not reduce the residual is halved; after `max_halvings` a Picard step is
taken from the base point. Where a step was accepted, but poor, the next direction is the residual itself, so that far
from the equilibrium, where the Jacobian says little, Newton steps do not creep.

Every Jacobian-vector product evaluates the cell once more (twice where it lacks forward-mode derivatives), and the
meter counts that as cell evaluations.

Source: Knoll and Keyes, "Jacobian-free Newton-Krylov methods", J. Comput. Phys. 2004, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_deq.solvers.base import FixedPointMap, Iterate, Solver, State
from robustbench_deq.solvers.krylov import gmres

POOR = 0.99
"""The share of the residual above which what a step left is poor: at that rate a hundred steps bring nothing home."""


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """State: `(base, base_f, direction, base_size, length, halvings)`.

    Args:
        krylov_size: dimension of the Krylov space, and Jacobian-vector products, per Newton step.
        max_halvings: how often a step that does not reduce the residual is halved.
    """

    needs_jvp: ClassVar[bool] = True
    krylov_size: int = 10
    max_halvings: int = 4

    def init(self, z: Tensor) -> State:
        flat = z.flatten(1)
        batch = len(flat)
        return (
            flat,
            flat,
            torch.zeros_like(flat),
            flat.new_full((batch,), torch.inf),
            flat.new_ones(batch),
            torch.zeros(batch, dtype=torch.int32, device=z.device),
        )

    def restart(self, state: State, mask: Tensor) -> State:
        base, base_f, direction, base_size, length, halvings = state
        return base, base_f, direction, base_size.masked_fill(mask, torch.inf), length, halvings.masked_fill(mask, 0)

    def step(self, fn: FixedPointMap, at: Iterate, state: State) -> tuple[Tensor, State]:
        base, base_f, direction, base_size, length, halvings = state
        z, g, size = at.z, at.g, at.size
        flat, image = z.flatten(1), at.f.flatten(1)
        is_accepted = size <= (1.0 - 1e-4 * length) * base_size
        gives_up = ~is_accepted & (halvings >= self.max_halvings)

        is_poor = is_accepted & (size > POOR * base_size)
        fresh = g
        if bool((is_accepted & ~is_poor).any()):
            fresh = gmres(lambda v: v - fn.jvp(z, v.view_as(z)).flatten(1), g, self.krylov_size)
            fresh = torch.where(torch.isfinite(fresh).all(1, keepdim=True) & ~is_poor[:, None], fresh, g)
        pick = is_accepted[:, None]
        base_size = torch.where(is_accepted, size, base_size).masked_fill(gives_up, torch.inf)
        length = torch.where(is_accepted, 1.0, length * 0.5)
        halvings = torch.where(is_accepted | gives_up, 0, halvings + 1)
        base, base_f = torch.where(pick, flat, base), torch.where(pick, image, base_f)
        direction = torch.where(pick, fresh, direction)
        moved = torch.where(gives_up[:, None], base_f, base + length[:, None] * direction)
        return moved.view_as(z), (base, base_f, direction, base_size, length, halvings)
