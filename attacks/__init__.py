"""Every attack, one family a file. Importing this package fills the registry `ATTACKS`."""

from typing import Any

from robustbench_deq.attacks.joint import JointPGD, JointPGDConfig
from robustbench_deq.attacks.noise import Noise, NoiseConfig
from robustbench_deq.attacks.sequential import SequentialPGD, SequentialPGDConfig
from robustbench_deq.attacks.torchattacks_bridge import TorchattacksConfig, TorchattacksPGD, TorchattacksPGDL2
from robustbench_deq.protocol import ATTACKS, Attack, make_attack
from robustbench_deq.threats import Threat

__all__ = [
    "ATTACKS",
    "JointPGD",
    "JointPGDConfig",
    "Noise",
    "NoiseConfig",
    "SequentialPGD",
    "SequentialPGDConfig",
    "TorchattacksConfig",
    "TorchattacksPGD",
    "TorchattacksPGDL2",
    "build_attack",
]


def build_attack(name: str, threat: Threat, settings: dict[str, Any]) -> Attack:
    """The attack that a name means. It stands here so that a worker that unpickles it has imported all of them."""
    return make_attack(name, threat, settings)
