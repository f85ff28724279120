"""A threat as configs, suites, model cards and `--set` name it. Cards are read without torch, which takes seconds to
import: only norms that do not come with the package, and `build`, need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, field_validator

from robustbench_deq.configs import Config, plain_number
from robustbench_deq.norm_names import NORM_NAMES

if TYPE_CHECKING:
    from robustbench_deq.optimise import Norm
    from robustbench_deq.threats import Threat


def _norm_name(norm: Norm | str | float) -> str:
    if isinstance(norm, str) and norm in NORM_NAMES:
        return norm
    from robustbench_deq.optimise import Norm

    return Norm.parse(norm).name


def _read_radius(value: object) -> object:
    value = plain_number(value)
    if isinstance(value, bool):
        raise ValueError("a valid number")
    return value


NormName = Annotated[str, BeforeValidator(_norm_name)]
"""The name of a norm, in lower case."""
Radius = Annotated[float, BeforeValidator(_read_radius), Field(ge=0)]
"""A radius in pixel units of [0, 1]; may be written `8/255`."""


class ThreatSpec(Config):
    """A norm ball, by the norm's name and its radius. As text `l2 0.5`."""

    norm: NormName = Field("l2", description="l1, l2 or linf")
    epsilon: Radius = Field(1.0, description="radius in pixel units of [0, 1]; may be written 8/255")

    @field_validator("epsilon", mode="before")
    @classmethod
    def _fraction(cls, value: object) -> object:
        return _read_radius(value)  # before `Config` refuses text where a number belongs

    def __str__(self) -> str:
        return f"{self.norm} {self.epsilon:g}"

    def build(self) -> Threat:
        from robustbench_deq.threats import Threat

        return Threat(self.norm, self.epsilon)
