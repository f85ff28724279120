"""The protocol between attacks and who runs them: what they are given, what they return, and what is held to."""

from robustbench_deq.protocol.attack import ATTACKS, Attack, ObjectiveAttack, frozen, likely_classes, make_attack
from robustbench_deq.protocol.batch import Batch, Clean, Proposal
from robustbench_deq.protocol.cascade import BATCH_SIZE, SEED, Cascade, Stage
from robustbench_deq.protocol.recorder import Recorder, Snapshot
from robustbench_deq.protocol.runs import AttackResult, Confirm, StageResult
from robustbench_deq.protocol.settings import AttackConfig, ObjectiveConfig, RunConfig

__all__ = [
    "ATTACKS",
    "BATCH_SIZE",
    "SEED",
    "Attack",
    "AttackConfig",
    "AttackResult",
    "Batch",
    "Cascade",
    "Clean",
    "Confirm",
    "ObjectiveAttack",
    "ObjectiveConfig",
    "Proposal",
    "Recorder",
    "RunConfig",
    "Snapshot",
    "Stage",
    "StageResult",
    "frozen",
    "likely_classes",
    "make_attack",
]
