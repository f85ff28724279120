"""The registered models: names `family.tag`. Shipped weights lie in `weights/<name>/`; tiny test models need none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from robustbench_deq.registry import Registry

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


class ModelEntry(NamedTuple):
    """A registered model: either saved in `folder`, or built from `config` alone."""

    name: str
    family: str
    folder: Path | None
    config: dict[str, Any]


MODELS: Registry[ModelEntry] = Registry("model")

for _family, _data in (
    ("deq-conv", "digits"),
    ("deq-conv", "fashion"),
    ("mondeq-fc", "digits"),
    ("mondeq-fc", "fashion"),
    ("deq-fc", "digits"),
):
    for _training in ("standard", "joint-l2"):
        _name = f"{_family}.{_data}-{_training}"
        MODELS.register(_name)(ModelEntry(_name, _family, WEIGHTS_FOLDER / _name, {}))

MODELS.register("test-linear.tiny")(ModelEntry("test-linear.tiny", "test-linear", None, {"input_shape": (1, 8, 8)}))
