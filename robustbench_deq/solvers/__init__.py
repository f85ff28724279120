"""Step-wise fixed-point solvers. `SOLVERS` names them; `base.Solve` drives them."""

from __future__ import annotations

from collections.abc import Callable

from robustbench_deq.registry import Registry
from robustbench_deq.solvers.anderson import Anderson
from robustbench_deq.solvers.base import CellMap, FixedPointMap, Solution, Solve, Solver, Status
from robustbench_deq.solvers.broyden import Broyden
from robustbench_deq.solvers.cell import Cell
from robustbench_deq.solvers.newton_krylov import NewtonKrylov
from robustbench_deq.solvers.picard import Picard

SOLVERS: Registry[Callable[[], Solver]] = Registry("solver")
SOLVERS.register("picard")(Picard)
SOLVERS.register("damped-picard")(lambda: Picard(damping=0.5))
SOLVERS.register("anderson")(Anderson)
SOLVERS.register("anderson-1")(lambda: Anderson(kind=1))
SOLVERS.register("broyden")(Broyden)
SOLVERS.register("newton-krylov")(NewtonKrylov)

__all__ = [
    "SOLVERS",
    "Anderson",
    "Broyden",
    "Cell",
    "CellMap",
    "FixedPointMap",
    "NewtonKrylov",
    "Picard",
    "Solution",
    "Solve",
    "Solver",
    "Status",
]
