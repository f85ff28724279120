"""Where the gradient with respect to the variable comes from. One source a file."""

from robustbench_deq.optimise.sources.base import Look, Settled, Source
from robustbench_deq.optimise.sources.frozen import Frozen
from robustbench_deq.optimise.sources.intermediate import Intermediate
from robustbench_deq.optimise.sources.joint import Joint, Mixing
from robustbench_deq.optimise.sources.solved import Solved

__all__ = ["Frozen", "Intermediate", "Joint", "Look", "Mixing", "Settled", "Solved", "Source"]
