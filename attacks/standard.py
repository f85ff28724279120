"""`standard` and `fast`: the standard evaluation, version 1; see `docs/standard.md`.

    joint-pgd     the default joint attack: cross-entropy, then margin
    toward        joint, toward each of nine wrong classes: what the default misses is the class
    restart       joint, from a random start                                                   (fast ends here)
    intermediate  PGD along the gradients of states on the way to the equilibrium, which an adjoint cannot hide
    pgd-toward    PGD toward each of them with full solves and implicit adjoints
    apgd-ce       APGD with full solves, for the cross-entropy, 100 steps
    apgd-t        APGD with full solves toward each of the nine classes, 100 steps each: the floor
    square-audit  torchattacks' Square, a search without gradients, on a keyed eighth of the survivors
    square        the same on all that are left, and
    fab-t         torchattacks' FAB, the smallest perturbation toward each class (both with `black_box=all`)

With `black_box=all` the audit is done again, too: it breaks the same samples as before, which `square`, whose draws are
others, need not. The last three draw from a generator of the batch, so that what they find depends on the batch, which
is therefore of a fixed size. They are not there for L1, which the library has not, and in L2 for images
that are not square or below five pixels, on which it fails.

Settings cannot be chosen: a number is comparable with others of the same version because of that.
"""

from __future__ import annotations

from typing import Literal, cast

from pydantic import Field

from robustbench_deq.attacks.apgd import SolvedAPGD
from robustbench_deq.attacks.apgd_t import TargetedAPGD
from robustbench_deq.attacks.intermediate import IntermediatePGD
from robustbench_deq.attacks.joint_pgd import JointPGD
from robustbench_deq.attacks.pgd import SequentialPGD
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import ATTACKS, AttackConfig, Cascade, Stage, make_attack

VERSION = "v1"
TIGHT, LOOSE = 1e-3, 1e-2
"""Of solves. 900 steps of `apgd-t` cost half as much with loose ones, and broke the same on validation images."""
NUM_HEADINGS = 9
HEADING_STEPS = 16
"""On validation images, twice as many broke no sample more."""
AUDIT = "square-audit"
"""The stage whose success has the evaluation done again with `black_box=all`."""
AUDITED_SHARE = 1 / 8
NUM_QUERIES = 1000
LEAST_SIDE = 5
"""Of images in pixels, which have to be square: the library's search in L2 fails on others."""
FAB_STEPS = 100


class FastConfig(AttackConfig):
    """The settings that every attack has, none of which can be chosen."""

    restarts: Literal[1] = Field(1, description="always 1: restarts are a stage")
    random_start: Literal[False] = Field(False, description="always false: random starts are a stage")
    stop_at_success: Literal[True] = Field(True, description="always true: stages attack what is left")
    max_evaluations: None = Field(None, description="always null: a number that a budget ended early is of no version")
    max_seconds: None = Field(None, description="always null, for the same reason")


@ATTACKS.register("fast")
class Fast(Cascade[FastConfig]):
    name = "fast"
    summary = "the standard evaluation's joint stages: a first answer"
    config_type = FastConfig
    version = VERSION

    def stages(self, num_classes: int, input_shape: tuple[int, ...]) -> tuple[Stage, ...]:
        toward = (JointPGD(self.threat, heading=rank, steps=HEADING_STEPS) for rank in headings(num_classes))
        return (
            Stage("joint-pgd", (JointPGD(self.threat),)),
            Stage("toward", tuple(toward)),
            Stage("restart", (JointPGD(self.threat, random_start=True),)),
        )


def headings(num_classes: int) -> range:
    """Ranks of the wrong classes that are headed for, from 1."""
    return range(1, min(NUM_HEADINGS, num_classes - 1) + 1)


class StandardConfig(FastConfig):
    black_box: Literal["audit", "all"] = Field(
        "audit", description="audit: an eighth of the survivors; all: then all of them, once an audit has broken any"
    )


@ATTACKS.register("standard")
class Standard(Fast):
    name = "standard"
    summary = "the standard evaluation: joint stages, intermediate states, PGD and APGD with full solves, black box"
    config_type = StandardConfig

    def stages(self, num_classes: int, input_shape: tuple[int, ...]) -> tuple[Stage, ...]:
        toward = (SequentialPGD(self.threat, heading=rank, tolerance=TIGHT) for rank in headings(num_classes))
        return (
            *super().stages(num_classes, input_shape),
            Stage("intermediate", (IntermediatePGD(self.threat),)),
            Stage("pgd-toward", tuple(toward)),
            Stage("apgd-ce", (SolvedAPGD(self.threat, objective="cross-entropy", tolerance=TIGHT),)),
            Stage("apgd-t", (TargetedAPGD(self.threat, tolerance=LOOSE),)),
            *self._black_box(input_shape),
        )

    def _black_box(self, input_shape: tuple[int, ...]) -> tuple[Stage, ...]:
        _, height, width = input_shape
        is_for_l2 = height == width >= LEAST_SIDE
        if self.threat.norm is Norm.L1 or (self.threat.norm is Norm.L2 and not is_for_l2):
            return ()
        square = make_attack("torchattacks:Square", self.threat, {"settings": {"n_queries": NUM_QUERIES}})
        audit = Stage(AUDIT, (square,), AUDITED_SHARE)
        if cast(StandardConfig, self.config).black_box == "audit":
            return (audit,)
        fab = make_attack("torchattacks:FAB", self.threat, {"settings": {"multi_targeted": True, "steps": FAB_STEPS}})
        return audit, Stage("square", (square,)), Stage("fab-t", (fab,))
