"""robustbench-deq: adversarial robustness of deep equilibrium models.

from robustbench_deq.attacks import JointPGD
from robustbench_deq import Norm, Threat, evaluate, load, load_model

model = load_model("deq-conv.fashion-joint-l2")                  # or your own EquilibriumModel
result = evaluate(model, JointPGD(Threat(Norm.L2, 1.0)), load("fashion-mnist", limit=256))
print(result.record.robust_accuracy, result.record.robust_accuracy_ci)
"""

import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_deq.benchmark import benchmark
    from robustbench_deq.data import SplitName, load
    from robustbench_deq.equilibrium import EquilibriumModel
    from robustbench_deq.errors import RunError, UsageError
    from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
    from robustbench_deq.evaluate.external import ExternalImages, judge_images
    from robustbench_deq.models import MODELS, load_model, save_model
    from robustbench_deq.optimise import Norm
    from robustbench_deq.threats import Threat

_PLACES = {
    "MODELS": "models",
    "EquilibriumModel": "equilibrium",
    "Evaluation": "evaluate.evaluation",
    "ExternalImages": "evaluate.external",
    "Norm": "optimise",
    "RunError": "errors",
    "SplitName": "data",
    "Threat": "threats",
    "UsageError": "errors",
    "benchmark": "benchmark",
    "evaluate": "evaluate.evaluation",
    "judge_images": "evaluate.external",
    "load": "data",
    "load_model": "models",
    "save_model": "models",
}
"""The module of each name, imported when the name is asked for: records are read and reported without torch."""

__all__ = [
    "MODELS",
    "EquilibriumModel",
    "Evaluation",
    "ExternalImages",
    "Norm",
    "RunError",
    "SplitName",
    "Threat",
    "UsageError",
    "benchmark",
    "evaluate",
    "judge_images",
    "load",
    "load_model",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version("robustbench-deq")
        except importlib.metadata.PackageNotFoundError:
            return "of a checkout that is not installed"
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Its public names stay what they are: importing the folder `evaluate` would put that in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
