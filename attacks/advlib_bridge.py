"""adversarial-library (`adv_lib`) on equilibrium models: `advlib:NAME` for every attack within a ball of a norm.

Most search for the smallest perturbation without a radius; what they find is projected.

Source: Rony, Ben Ayed, "Adversarial Library", 2020.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, ClassVar, cast

from torch import Tensor

from robustbench_deq.attacks.bridge import BridgedAttack, Foreign, NamedConfig, Network, missing, unknown
from robustbench_deq.errors import UsageError
from robustbench_deq.protocol import ATTACKS, Attack, Batch

LIBRARY = "advlib"
NORMS = {
    "alma": ("l2", "l1"),
    "apgd": ("linf", "l2", "l1"),
    "apgd_targeted": ("linf", "l2", "l1"),
    "carlini_wagner_l2": ("l2",),
    "carlini_wagner_linf": ("linf",),
    "ddn": ("l2",),
    "df": ("l2", "linf"),
    "fab": ("linf", "l2", "l1"),
    "fmn": ("linf", "l2", "l1"),
    "pdgd": ("l2",),
    "pdpgd": ("linf", "l2", "l1"),
    "pgd_linf": ("linf",),
    "sdf": ("l2",),
    "tr": ("l2", "linf"),
}
REFUSED = {
    **dict.fromkeys(("fga", "sigma_zero", "vfga"), "one that counts pixels, which has no ball here"),
    "perc_al": "one of colours as eyes see them, which has no ball here",
    "str_attack": "one that counts groups of pixels, which has no ball here",
}
ORDERS = {"l1": 1, "l2": 2, "linf": float("inf")}
SET_HERE = {"model", "inputs", "labels", "targeted", "eps", "ε", "norm", "p", "distance", "callback"}


class _AdvLib(BridgedAttack[NamedConfig]):
    """member: the library's function."""

    member: ClassVar[str]

    def perturbed(self, network: Network, batch: Batch, settings: dict[str, Any], epsilon: float) -> Tensor:
        attack, norm = getattr(_library(), self.member), self.threat.norm.name
        parameters, order = inspect.signature(attack).parameters, ORDERS[norm]
        own = {"eps": epsilon, "ε": epsilon, "norm": order, "p": order, "distance": norm}
        own["targeted"] = batch.targets is not None
        if self.member == "tr":
            del own["eps"]  # there it is a step's length, not the radius
        known = {key: value for key, value in own.items() if key in parameters}
        labels = batch.labels if batch.targets is None else batch.targets
        return cast(Tensor, attack(network, batch.images, labels, **known, **settings))


def _library() -> Any:
    """Raises `UsageError` without the library."""
    try:
        return importlib.import_module("adv_lib.attacks")
    except ModuleNotFoundError as error:
        raise missing(LIBRARY, "pip install adv-lib; it needs visdom, which needs 'setuptools<80' to build") from error


def _names() -> list[str]:
    """Of those that can run here; none without the library."""
    try:
        return sorted(NORMS.keys() & vars(_library()).keys())
    except UsageError:
        return []


@functools.cache
def _named(member: str) -> type[Attack[Any]]:
    """The attack `advlib:MEMBER`. Raises `UsageError` for one that the library has not, or that cannot run."""
    attack = getattr(_library(), member, None)
    if member not in NORMS or attack is None:
        raise unknown(LIBRARY, member, _names(), REFUSED.get(member))
    settings = tuple(name for name in inspect.signature(attack).parameters if name not in SET_HERE)
    values = {
        "__module__": __name__,
        "name": f"{LIBRARY}:{member}",
        "summary": f"adversarial-library's {member} through forward and autograd",
        "config_type": NamedConfig,
        "foreign": Foreign(NORMS[member], settings),
        "member": member,
    }
    return type(f"AdvLib{member}", (_AdvLib,), values)


ATTACKS.register_prefix(LIBRARY, _named, _names)
