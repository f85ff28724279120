"""The registered models: names `family.tag`. Every folder in `weights/` is one, in alphabetical order; tiny test models
need none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from robustbench_deq.registry import Registry

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


class ModelEntry(NamedTuple):
    """A registered model: either saved in `folder`, or built from `config` alone.

    num_parameters    of one without a folder, where nothing else says it
    """

    name: str
    family: str
    folder: Path | None
    config: dict[str, Any]
    num_parameters: int = 0


MODELS: Registry[ModelEntry] = Registry("model")

for _description in sorted(WEIGHTS_FOLDER.glob("*/model.json")):
    _name = _description.parent.name
    MODELS.register(_name)(ModelEntry(_name, _name.partition(".")[0], _description.parent, {}))

_TINY = {"input_shape": [1, 8, 8], "num_classes": 10}
MODELS.register("test-linear.tiny")(ModelEntry("test-linear.tiny", "test-linear", None, _TINY, 1044))
