"""foolbox on equilibrium models: `foolbox:NAME` for every attack that takes one model and labels within a ball.

An attack of foolbox is of one norm, or takes the distance as a setting, which is the threat's. Attacks for the smallest
perturbation search without a radius; what they find is clipped to it.

Source: Rauber, Zimmermann, Bethge, Brendel, "Foolbox Native", Journal of Open Source Software 5, 2020.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any, ClassVar, cast

from torch import Tensor

from robustbench_deq.attacks.bridge import BridgedAttack, Foreign, NamedConfig, Network, missing, unknown
from robustbench_deq.errors import UsageError
from robustbench_deq.protocol import ATTACKS, Attack, Batch

LIBRARY = "foolbox"
REFUSED = {
    "BinarizationRefinementAttack": "one that refines what another attack has found",
    "DatasetAttack": "one that is fed with other images",
    "PointwiseAttack": "one that counts pixels, which has no ball here",
    "SpatialAttack": "one that turns images, which has no ball here",
}
WITHOUT_GRADIENT = ("Noise", "Blur", "BoundaryAttack", "Contrast", "GenAttack", "HopSkipJump", "Inversion")
"""What the names of attacks have in them that ask for no gradient."""
ORDERS = {1: "l1", 2: "l2", float("inf"): "linf"}
SET_HERE = {"self", "distance", "constraint"}


class _Foolbox(BridgedAttack[NamedConfig]):
    """member: the library's class."""

    member: ClassVar[str]

    def perturbed(self, network: Network, batch: Batch, settings: dict[str, Any], epsilon: float) -> Tensor:
        foolbox = _library()
        kind, norm = getattr(foolbox.attacks, self.member), self.threat.norm.name
        known = {"distance": getattr(foolbox.distances, norm), "constraint": norm}
        parameters = inspect.signature(kind).parameters
        attack = kind(**{key: value for key, value in known.items() if key in parameters}, **settings)
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=batch.images.device)
        if batch.targets is None:
            criterion = foolbox.criteria.Misclassification(batch.labels)
        else:
            criterion = foolbox.criteria.TargetedMisclassification(batch.targets)
        return cast(Tensor, attack(model, batch.images, criterion, epsilons=epsilon)[1])


def _library() -> Any:
    """Raises `UsageError` without the library."""
    try:
        return importlib.import_module("foolbox")
    except ModuleNotFoundError as error:
        raise missing(LIBRARY, "pip install 'robustbench-deq[peers]'") from error


@functools.cache
def _members() -> dict[str, tuple[str, ...]]:
    """The library's attacks, and the norms of each: none of those that cannot run. Raises `UsageError` without it."""
    attacks, found = _library().attacks, {}
    base = attacks.base.Attack
    for name, kind in vars(attacks).items():
        if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind):
            found[name] = () if _refusal(name) else _norms(kind)
    return found


def _refusal(name: str) -> str | None:
    """Why an attack of the library cannot run, if nothing but its name is needed to say so."""
    if "BrendelBethge" in name and importlib.util.find_spec("numba") is None:
        return "one that needs the package numba"
    return REFUSED.get(name)


def _norms(kind: Any) -> tuple[str, ...]:
    parameters = inspect.signature(kind).parameters
    if "distance" in parameters:
        return tuple(ORDERS.values())
    if "constraint" in parameters:
        return "l2", "linf"
    distance = kind.distance if hasattr(kind, "distance") else None
    if isinstance(distance, property):
        distance = kind().distance
    order = getattr(distance, "p", None)
    return (ORDERS[order],) if order in ORDERS else ()


def _names() -> list[str]:
    """Of those that can run here; none without the library."""
    try:
        return sorted(name for name, norms in _members().items() if norms)
    except UsageError:
        return []


@functools.cache
def _named(member: str) -> type[Attack[Any]]:
    """The attack `foolbox:MEMBER`. Raises `UsageError` for one that the library has not, or that cannot run."""
    norms = _members().get(member)
    if not norms:
        reason = "one that counts pixels, which has no ball here" if norms == () else None
        raise unknown(LIBRARY, member, _names(), _refusal(member) or reason)
    parameters = inspect.signature(getattr(_library().attacks, member)).parameters
    is_gradient_based = not any(word in member for word in WITHOUT_GRADIENT)
    values = {
        "__module__": __name__,
        "name": f"{LIBRARY}:{member}",
        "summary": f"foolbox's {member} through forward and autograd",
        "config_type": NamedConfig,
        "is_gradient_based": is_gradient_based,
        "foreign": Foreign(norms, tuple(name for name in parameters if name not in SET_HERE), is_gradient_based),
        "member": member,
    }
    return type(f"Foolbox{member}", (_Foolbox,), values)


ATTACKS.register_prefix(LIBRARY, _named, _names)
