"""torchattacks on equilibrium models: `torchattacks:NAME` for every attack that takes one model and labels.

`torchattacks-pgd` and `torchattacks-pgdl2` are its `PGD` and `PGDL2` with the settings of this package: a step as a
fraction of epsilon, and no random start, so that no sample depends on its batch.

A step size of the library's (`alpha`) that nobody sets is its default's share of its default radius. Its losses are the
mean of the cross-entropy over the batch, but for those of `SUMMED`.

Source: Kim, "Torchattacks: a PyTorch repository for adversarial attacks", arXiv 2010.01950.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar, cast

from pydantic import Field
from torch import Tensor

from robustbench_deq.attacks.bridge import BridgeConfig, BridgedAttack, C, Foreign, NamedConfig, Network, unknown
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import ATTACKS, Attack, Batch

LIBRARY = "torchattacks"
NORMS = {
    **dict.fromkeys(("APGD", "APGDT", "AutoAttack", "Square"), ("linf", "l2")),
    **dict.fromkeys(("CW", "DeepFool", "PGDL2", "PGDRSL2"), ("l2",)),
    **dict.fromkeys(("EADL1", "EADEN"), ("l1",)),
    "FAB": ("linf", "l2"),
}
"""Of all others it is the maximum norm. FAB names L1, and fails there."""
REFUSED = {
    **dict.fromkeys(("JSMA", "OnePixel", "Pixle", "SparseFool"), "one that counts pixels, which has no ball here"),
    "GN": "Gaussian noise, which has no radius",
    "LGV": "one that trains models on data",
    "MultiAttack": "one that takes attacks in place of a model",
    "VANILA": "one that leaves the images as they are",
}
SUMMED = {"APGD", "APGDT", "AutoAttack", "CW", "DeepFool", "EADEN", "EADL1", "FAB", "SPSA", "Square"}
WITHOUT_GRADIENT = {"SPSA", "Square"}
OF_COLOURS = {"PIFGSM", "PIFGSMPP", "TIFGSM"}
SET_HERE = {"model", "eps", "max_epsilon", "norm", "n_classes", "seed", "verbose"}
SPELLED = {"l1": "L1", "l2": "L2", "linf": "Linf"}


class _Torchattacks(BridgedAttack[C]):
    """member: the library's class. The library brings SciPy's statistics and half a second of imports along, and is
    imported when an attack of it is asked for."""

    member: ClassVar[str]

    def perturbed(self, network: Network, batch: Batch, settings: dict[str, Any], epsilon: float) -> Tensor:
        import torchattacks  # type: ignore[import-untyped]  # the library ships no types

        channels = network.model.input_shape[0]
        if self.member in OF_COLOURS and channels != 3:
            raise UsageError.of(
                self.name, expected="images of three colours", got=channels, fix="choose another attack or model"
            )
        kind = getattr(torchattacks, self.member)
        parameters = inspect.signature(kind).parameters
        radius = "max_epsilon" if "max_epsilon" in parameters else "eps"
        own: dict[str, Any] = {
            radius: epsilon,
            "norm": SPELLED[self.threat.norm.name],
            "n_classes": network.model.num_classes,
        }
        own["seed"] = batch.seed
        if "alpha" in parameters:
            own["alpha"] = parameters["alpha"].default / parameters[radius].default * epsilon
        library = kind(network, **{key: value for key, value in own.items() if key in parameters} | settings)
        library.set_device(batch.images.device)
        if batch.targets is None:
            return cast(Tensor, library(batch.images, batch.labels))
        if "targeted" not in library.supported_mode:
            raise UsageError.of(self.name, expected="an untargeted run", got="targets", fix="drop --targeted")
        library.set_mode_targeted_by_label(quiet=True)
        return cast(Tensor, library(batch.images, batch.targets))


class TorchattacksConfig(BridgeConfig):
    steps: int = Field(20, ge=1, description="gradient steps")
    step_size: float = Field(0.25, gt=0, le=1e6, description="step as a fraction of epsilon")


class _TorchattacksPGD(_Torchattacks[TorchattacksConfig]):
    """What both have in common."""

    config_type = TorchattacksConfig

    def own_settings(self, epsilon: float) -> dict[str, Any]:
        return {"alpha": self.config.step_size * epsilon, "steps": self.config.steps, "random_start": False}


def _foreign(norm: Norm) -> Foreign:
    return Foreign((norm.name,), ("alpha", "steps", "random_start"), takes_mean=True)


@ATTACKS.register("torchattacks-pgd")
class TorchattacksPGD(_TorchattacksPGD):
    name = "torchattacks-pgd"
    summary = "torchattacks' PGD (Linf) through forward and autograd"
    foreign, member = _foreign(Norm.LINF), "PGD"


@ATTACKS.register("torchattacks-pgdl2")
class TorchattacksPGDL2(_TorchattacksPGD):
    name = "torchattacks-pgdl2"
    summary = "torchattacks' PGDL2 (L2) through forward and autograd"
    foreign, member = _foreign(Norm.L2), "PGDL2"


def _members() -> dict[str, Any]:
    """The library's classes of attacks."""
    import torchattacks
    from torchattacks.attack import Attack as Base  # type: ignore[import-untyped]  # the library ships no types

    return {
        name: kind for name, kind in vars(torchattacks).items() if isinstance(kind, type) and issubclass(kind, Base)
    }


def _names() -> list[str]:
    """Of those that can run here."""
    return sorted(_members().keys() - REFUSED.keys())


@functools.cache
def _named(member: str) -> type[Attack[Any]]:
    """The attack `torchattacks:MEMBER`. Raises `UsageError` for one that the library has not, or that cannot run."""
    kind = _members().get(member)
    if kind is None or member in REFUSED:
        raise unknown(LIBRARY, member, _names(), REFUSED.get(member))
    foreign = Foreign(
        norms=NORMS.get(member, ("linf",)),
        settings=tuple(name for name in inspect.signature(kind).parameters if name not in SET_HERE),
        is_gradient_based=member not in WITHOUT_GRADIENT,
        takes_mean=member not in SUMMED,
    )
    values = {
        "__module__": __name__,
        "name": f"{LIBRARY}:{member}",
        "summary": f"torchattacks' {member} through forward and autograd",
        "config_type": NamedConfig,
        "is_gradient_based": foreign.is_gradient_based,
        "foreign": foreign,
        "member": member,
    }
    return type(f"Torchattacks{member}", (_Torchattacks,), values)


ATTACKS.register_prefix(LIBRARY, _named, _names)
