"""Every family, imported so that `FAMILIES` holds them all."""

from robustbench_deq.models import deq_conv, deq_fc, explicit, lben, linear, mdeq, mondeq_conv, mondeq_fc, mondeq_multi
from robustbench_deq.models.base import FAMILIES

__all__ = [
    "FAMILIES",
    "deq_conv",
    "deq_fc",
    "explicit",
    "lben",
    "linear",
    "mdeq",
    "mondeq_conv",
    "mondeq_fc",
    "mondeq_multi",
]
