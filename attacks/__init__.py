"""Every attack, one family a file. Importing this package fills the registry `ATTACKS`."""

from attacks.joint import JointPGD, JointPGDConfig
from attacks.noise import Noise, NoiseConfig
from attacks.sequential import SequentialPGD, SequentialPGDConfig
from attacks.torchattacks_bridge import TorchattacksConfig, TorchattacksPGD, TorchattacksPGDL2
from robustbench_deq.attack import ATTACKS

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
]
