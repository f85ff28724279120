"""Datasets with fixed train, validation and test splits. `DATASETS` names them, `load` reads a split."""

from robustbench_deq.data.sources import DATASETS, DatasetInfo
from robustbench_deq.data.splits import Split, SplitName, is_own_file, load, split_sizes

__all__ = ["DATASETS", "DatasetInfo", "Split", "SplitName", "is_own_file", "load", "split_sizes"]
