"""Datasets with fixed train, validation and test splits. `DATASETS` names them, `load` reads a split."""

from typing import TYPE_CHECKING

from robustbench_deq.lazy import names_of

if TYPE_CHECKING:
    from robustbench_deq.data.sources import DATASETS, DatasetInfo
    from robustbench_deq.data.splits import Split, SplitName, is_own_file, load, split_sizes

_PLACES = {
    "DATASETS": "sources",
    "DatasetInfo": "sources",
    "Split": "splits",
    "SplitName": "splits",
    "is_own_file": "splits",
    "load": "splits",
    "split_sizes": "splits",
}
"""The module of each name."""

__getattr__, __dir__ = names_of(__name__, _PLACES)

__all__ = ["DATASETS", "DatasetInfo", "Split", "SplitName", "is_own_file", "load", "split_sizes"]
