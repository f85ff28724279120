"""Where a variable may be: a norm ball in the pixel box, a box, free space. One norm a file."""

from robustbench_deq.optimise.domains.ball import Ball
from robustbench_deq.optimise.domains.base import Domain
from robustbench_deq.optimise.domains.box import Box, Free
from robustbench_deq.optimise.domains.l1 import L1
from robustbench_deq.optimise.domains.l2 import L2
from robustbench_deq.optimise.domains.linf import LInf
from robustbench_deq.optimise.domains.norm import NORMS, Norm

__all__ = ["L1", "L2", "NORMS", "Ball", "Box", "Domain", "Free", "LInf", "Norm"]
