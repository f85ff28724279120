"""`datasets`: what is registered."""

from __future__ import annotations

from robustbench_deq.commands.rows import echo_listing
from robustbench_deq.data import DATASETS


def datasets(is_json: bool) -> None:
    """List datasets. Your own: npz:FILE with arrays 'images' and 'labels'."""
    rows = [
        {
            "name": info.name,
            "shape": "x".join(map(str, info.input_shape)),
            "classes": info.num_classes,
            "summary": info.summary,
        }
        for info in map(DATASETS.get, DATASETS)
    ]
    echo_listing(rows, "datasets", is_json)
