"""Every attack, a file each. Importing this package fills the registry `ATTACKS`."""

from typing import Any

import robustbench_deq.attacks.advlib_bridge
import robustbench_deq.attacks.foolbox_bridge  # noqa: F401  # both register a prefix
from robustbench_deq.attacks.apgd import SolvedAPGD, SolvedAPGDConfig
from robustbench_deq.attacks.apgd_t import TargetedAPGD, TargetedAPGDConfig
from robustbench_deq.attacks.fgsm import FGSM, FGSMConfig
from robustbench_deq.attacks.fmn import FMN, FMNConfig
from robustbench_deq.attacks.intermediate import IntermediatePGD, IntermediatePGDConfig
from robustbench_deq.attacks.joint_apgd import JointAPGD, JointAPGDConfig
from robustbench_deq.attacks.joint_fmn import JointFMN, JointFMNConfig
from robustbench_deq.attacks.joint_pgd import JointPGD, JointPGDConfig
from robustbench_deq.attacks.noise import Noise, NoiseConfig
from robustbench_deq.attacks.pgd import SequentialPGD, SequentialPGDConfig
from robustbench_deq.attacks.standard import Fast, FastConfig, Standard, StandardConfig
from robustbench_deq.attacks.torchattacks_bridge import TorchattacksConfig, TorchattacksPGD, TorchattacksPGDL2
from robustbench_deq.attacks.yopo import YOPO, YOPOConfig
from robustbench_deq.protocol import ATTACKS, Attack, make_attack
from robustbench_deq.threats import Threat

__all__ = [
    "ATTACKS",
    "FGSM",
    "FMN",
    "YOPO",
    "FGSMConfig",
    "FMNConfig",
    "Fast",
    "FastConfig",
    "IntermediatePGD",
    "IntermediatePGDConfig",
    "JointAPGD",
    "JointAPGDConfig",
    "JointFMN",
    "JointFMNConfig",
    "JointPGD",
    "JointPGDConfig",
    "Noise",
    "NoiseConfig",
    "SequentialPGD",
    "SequentialPGDConfig",
    "SolvedAPGD",
    "SolvedAPGDConfig",
    "Standard",
    "StandardConfig",
    "TargetedAPGD",
    "TargetedAPGDConfig",
    "TorchattacksConfig",
    "TorchattacksPGD",
    "TorchattacksPGDL2",
    "YOPOConfig",
]


def build_attack(name: str, threat: Threat, settings: dict[str, Any]) -> Attack[Any]:
    """The attack that a name means. It stands here so that a worker that unpickles it has imported all of them."""
    return make_attack(name, threat, settings)
