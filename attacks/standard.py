"""`standard` and `fast`: the standard evaluation, version 1; see `docs/standard.md`.

    joint-pgd     the default joint attack: cross-entropy, then margin
    toward-1..9   joint, toward the wrong class of the rank-th largest logit: what the default misses is the class
    restart       joint, from a random start

Settings cannot be chosen: a number is comparable with others of the same version because of that.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from robustbench_deq.attacks.joint_pgd import JointPGD
from robustbench_deq.protocol import ATTACKS, AttackConfig, Cascade, Stage

VERSION = "v1"
NUM_HEADINGS = 9
HEADING_STEPS = 16
"""On validation images, twice as many broke no sample more."""


class StandardConfig(AttackConfig):
    """The settings that every attack has, where they can be chosen at all."""

    restarts: Literal[1] = Field(1, description="always 1: restarts are a stage")
    random_start: Literal[False] = Field(False, description="always false: random starts are a stage")
    stop_at_success: Literal[True] = Field(True, description="always true: stages attack what is left")


@ATTACKS.register("fast")
class Fast(Cascade[StandardConfig]):
    name = "fast"
    summary = "the standard evaluation's joint stages: a first answer"
    config_type = StandardConfig
    version = VERSION

    def stages(self, num_classes: int) -> tuple[Stage, ...]:
        ranks = range(1, min(NUM_HEADINGS, num_classes - 1) + 1)
        return (
            Stage("joint-pgd", JointPGD(self.threat)),
            *(Stage(f"toward-{rank}", JointPGD(self.threat, heading=rank, steps=HEADING_STEPS)) for rank in ranks),
            Stage("restart", JointPGD(self.threat, random_start=True)),
        )
