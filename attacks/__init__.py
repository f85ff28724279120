"""Every attack, one family a file. Importing this package fills the registry `ATTACKS`."""

from attacks.joint import JointPGD, JointPGDConfig
from attacks.sequential import SequentialPGD, SequentialPGDConfig
from robustbench_deq.attack import ATTACKS

__all__ = ["ATTACKS", "JointPGD", "JointPGDConfig", "SequentialPGD", "SequentialPGDConfig"]
