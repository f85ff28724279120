"""One DEQ family a file."""

from robustbench_deq.models.base import FAMILIES, Family, ModelConfig
from robustbench_deq.models.deq_conv import DEQConv, DEQConvConfig
from robustbench_deq.models.deq_fc import DEQFC, DEQFCConfig
from robustbench_deq.models.linear import Linear, LinearConfig
from robustbench_deq.models.mondeq_fc import MonDEQFC, MonDEQFCConfig

__all__ = [
    "DEQFC",
    "FAMILIES",
    "DEQConv",
    "DEQConvConfig",
    "DEQFCConfig",
    "Family",
    "Linear",
    "LinearConfig",
    "ModelConfig",
    "MonDEQFC",
    "MonDEQFCConfig",
]
