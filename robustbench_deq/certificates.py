"""Which samples a model's own guarantee shows robust, without an attack.

A model that knows how far its logits can move names an L2 radius for every sample (`EquilibriumModel.certified_radii`).
A threat's ball lies in an L2 ball: that of L1 in the one of its own radius, that of Linf in one of sqrt(pixels) times
its radius. Where the latter is smaller than the sample's, no attack can break the sample. That it does so all the same
is an error of the model or of the judge.
"""

from __future__ import annotations

import math

from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.threats import Threat


def certified(model: EquilibriumModel, threat: Threat, z: Tensor, y: Tensor) -> Tensor | None:
    """Which samples nothing within the threat's ball breaks, `(batch,)` on the device of `z`.

    Args:
        z: equilibria at the clean images `(batch, ...)`, to the judge's tolerance, such as `Clean.settled.z`. Where the
            judge has found none, the answer means nothing: take it together with `is_correct`.
        y: classes `(batch,)`.

    Returns:
        None where there is no certificate: the model has none, or the norm's ball is in no known L2 ball.
    """
    radius, radii = threat.l2_radius(math.prod(model.input_shape)), model.certified_radii(z, y)
    return None if radius is None or radii is None else radii > radius
