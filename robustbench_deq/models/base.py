"""What every model family shares: a typed config, the model that is made from it alone, and its place in `FAMILIES`.

A config says all that a saved model needs but its weights: the shape of the data, the family's own settings, and how
`forward` finds equilibria and is differentiated when a call does not say. `SizedConfig` adds named sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import (
    Field,
    JsonValue,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from robustbench_deq.adjoints import ADJOINTS, DEFAULT_ADJOINT_SOLVE, Adjoint
from robustbench_deq.configs import Config, named_in
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.registry import Registry
from robustbench_deq.solvers import SOLVERS, Solve


class _Spec(Config):
    """A config whose fields `later`, which came after it was first saved, are written only where they are set: a saved
    run or model that does not use them reads as it did."""

    later: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _leave_out(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value or name not in self.later}


class SolveSpec(_Spec):
    """A solver by name, its own settings, and when it stops."""

    later = frozenset({"settings"})

    solver: Annotated[str, named_in(SOLVERS)] = Field("anderson", description="a registered solver")
    tolerance: float = Field(1e-4, gt=0, description="relative residual at which a sample is done")
    max_steps: int = Field(100, ge=1, description="most steps of a solve")
    settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="the solver's own: history_size, damping, ridge, ..."
    )

    @model_validator(mode="after")
    def _check_settings(self) -> SolveSpec:
        solver = SOLVERS.get(self.solver)()
        defaults = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver)}
        defaults.pop("kind", None)  # Anderson's: the solver's name says it
        for name, value in self.settings.items():
            if name not in defaults:
                raise ValueError(f"settings of {self.solver} among {', '.join(defaults)}, and no {name!r}")
            is_count = isinstance(defaults[name], int)
            number, least = ("an integer >= 1", 1) if is_count else ("a number >= 0", 0)
            if type(value) not in ((int,) if is_count else (int, float)) or value < least:
                raise ValueError(f"{number} as the setting {name}, and not {value!r}")
        return self

    def build(self) -> Solve:
        solver = dataclasses.replace(SOLVERS.get(self.solver)(), **self.settings)
        return Solve(solver, rtol=self.tolerance, max_steps=self.max_steps)


class AdjointSpec(_Spec):
    """An adjoint by name. A setting that its kind does not use is refused."""

    later = frozenset({"damping"})

    name: Annotated[str, named_in(ADJOINTS)] = Field("implicit", description="a registered adjoint")
    solve: SolveSpec | None = Field(None, description="of implicit; null: Anderson to 1e-4")
    num_steps: int | None = Field(None, ge=1, description="terms or steps of neumann, phantom, unrolled")
    damping: float | None = Field(None, gt=0, le=1, description="of the steps of phantom and unrolled")

    @model_validator(mode="after")
    def _check_used(self) -> AdjointSpec:
        unused = {
            "implicit": ("num_steps", "damping"),
            "jacobian-free": ("solve", "num_steps", "damping"),
            "neumann": ("solve", "damping"),
        }.get(self.name, ("solve",))
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"no {name} with the adjoint {self.name}, which does not use it")
        return self

    def build(self) -> Adjoint:
        solve = self.solve.build() if self.solve else DEFAULT_ADJOINT_SOLVE
        return ADJOINTS.get(self.name)(solve, self.num_steps, self.damping)


class ModelConfig(Config):
    """Shape of the data, its normalisation, which lives inside the model, and the defaults of `forward`."""

    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="channels, height, width")
    num_classes: int = Field(10, ge=2, description="number of classes")
    pixel_mean: float = Field(0.0, description="subtracted from every pixel")
    pixel_std: float = Field(1.0, gt=0, description="divides every pixel")
    solve: SolveSpec = Field(SolveSpec(), description="how forward finds equilibria when the call does not say")
    adjoint: AdjointSpec = Field(AdjointSpec(), description="how forward is differentiated when the call does not say")


Sizes = Mapping[str, Mapping[str, Any]]
"""Names to the settings that a size stands for."""


class SizedConfig(ModelConfig):
    """A config of a family with named sizes: a size gives the settings that are not given themselves."""

    sizes: ClassVar[Sizes]

    size: str | None = Field(None, description="a named size, which gives the settings that are not given themselves")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        return {**cls.sizes[size], **values} if isinstance(size, str) and size in cls.sizes else values

    @field_validator("size")
    @classmethod
    def _is_known(cls, size: str | None) -> str | None:
        if size is not None and size not in cls.sizes:
            raise ValueError(f"one of {', '.join(cls.sizes)}")
        return size


class FamilyModel(EquilibriumModel):
    """A model that its config makes; subclasses add the weights and the four methods of `EquilibriumModel`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_shape, self.num_classes = config.input_shape, config.num_classes
        self.solve, self.adjoint = config.solve.build(), config.adjoint.build()

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.config.pixel_mean) / self.config.pixel_std

    def certificates(self) -> dict[str, float]:
        """What the weights guarantee on every image, by the names of the card's fields."""
        return {}


def iterates(model: EquilibriumModel, u: Tensor, num_steps: int) -> Iterator[Tensor]:
    """The states 1 to `num_steps` of the plain iteration from the initial one, as they come."""
    z = model.initial_state(u)
    for _ in range(num_steps):
        z = model.cell(z, u)
        yield z


def group_norm(groups: int, channels: int) -> nn.Module:
    """Group norm over `channels`, or the identity for no groups."""
    return nn.GroupNorm(groups, channels) if groups else nn.Identity()


class Family(NamedTuple):
    name: str
    config_type: type[ModelConfig]
    build: Callable[[ModelConfig], FamilyModel]


FAMILIES: Registry[Family] = Registry("family")


def add_family(name: str, config_type: type[ModelConfig]) -> Callable[[type], type]:
    """Class decorator that registers a model family."""

    def add(model_type: type) -> type:
        model_type.family = name
        FAMILIES.register(name)(Family(name, config_type, model_type))
        return model_type

    return add
