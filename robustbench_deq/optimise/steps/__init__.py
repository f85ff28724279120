"""How the variable moves. One step a file."""

from robustbench_deq.optimise.steps.adam import Adam
from robustbench_deq.optimise.steps.apgd import APGD
from robustbench_deq.optimise.steps.base import At, Schedule, Step
from robustbench_deq.optimise.steps.langevin import Langevin
from robustbench_deq.optimise.steps.minimal_norm import MinimalNorm
from robustbench_deq.optimise.steps.projected_ascent import ProjectedAscent

__all__ = ["APGD", "Adam", "At", "Langevin", "MinimalNorm", "ProjectedAscent", "Schedule", "Step"]
