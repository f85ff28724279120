"""The heart: one loop over inputs of equilibrium models, and its interchangeable parts."""

from robustbench_deq.optimise.contraction import Contraction, estimate_contraction
from robustbench_deq.optimise.domains import NORMS, Ball, Box, Domain, Free, Norm
from robustbench_deq.optimise.keep import HighestLoss, JIIORule, Keep, Last, SmallestNorm
from robustbench_deq.optimise.loop import Optimum, has_slope, optimise
from robustbench_deq.optimise.objectives import OBJECTIVES, Objective, Targeted, Toward, TowardDLR
from robustbench_deq.optimise.pace import AdaptivePace
from robustbench_deq.optimise.problem import Classification, Losses, Problem, Reconstruction, Shared
from robustbench_deq.optimise.sources import Frozen, Intermediate, Joint, Look, Mixing, Settled, Solved, Source
from robustbench_deq.optimise.steps import APGD, Adam, Langevin, MinimalNorm, ProjectedAscent, Schedule, Step

__all__ = [
    "APGD",
    "NORMS",
    "OBJECTIVES",
    "Adam",
    "AdaptivePace",
    "Ball",
    "Box",
    "Classification",
    "Contraction",
    "Domain",
    "Free",
    "Frozen",
    "HighestLoss",
    "Intermediate",
    "JIIORule",
    "Joint",
    "Keep",
    "Langevin",
    "Last",
    "Look",
    "Losses",
    "MinimalNorm",
    "Mixing",
    "Norm",
    "Objective",
    "Optimum",
    "Problem",
    "ProjectedAscent",
    "Reconstruction",
    "Schedule",
    "Settled",
    "Shared",
    "SmallestNorm",
    "Solved",
    "Source",
    "Step",
    "Targeted",
    "Toward",
    "TowardDLR",
    "estimate_contraction",
    "has_slope",
    "optimise",
]
