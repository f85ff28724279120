"""robustbench-deq: adversarial robustness of deep equilibrium models.

from attacks import JointPGD
from robustbench_deq import Norm, Threat, evaluate, load, load_model

model = load_model("deq-conv.fashion-joint-l2")                  # or your own EquilibriumModel
result = evaluate(model, JointPGD(Threat(Norm.L2, 1.0)), load("fashion-mnist", limit=256))
print(result.record.robust_accuracy, result.record.robust_accuracy_ci)
"""

from robustbench_deq.bench.evaluate import Evaluation, evaluate
from robustbench_deq.data import SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.models import MODELS, load_model, save_model
from robustbench_deq.threats import Norm, Threat

__all__ = [
    "MODELS",
    "EquilibriumModel",
    "Evaluation",
    "Norm",
    "RunError",
    "SplitName",
    "Threat",
    "UsageError",
    "evaluate",
    "load",
    "load_model",
    "save_model",
]
