"""What every model family shares: a typed config, the model that is made from it alone, and its place in `FAMILIES`.

A config says all that a saved model needs but its weights: the shape of the data, the family's own settings, and how
`forward` finds equilibria and is differentiated when a call does not say. `SizedConfig` adds named sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from robustbench_deq.configs import Config, validate
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.registry import Registry
from robustbench_deq.specs import AdjointSpec, SolveSpec

Size = Annotated[int, Field(ge=1, le=4096)]
"""Of an axis of images, of channels and the like."""


class ModelConfig(Config):
    """Shape of the data, its normalisation, which lives inside the model, and the defaults of `forward`."""

    input_shape: tuple[Size, Size, Size] = Field(description="channels, height, width")
    num_classes: int = Field(10, ge=2, le=100_000, description="number of classes")
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

    def make(self, settings: Mapping[str, Any], where: str) -> FamilyModel:
        """A new model from plain settings.

        Args:
            where: what the settings are from, for the message.

        Raises:
            UsageError: for settings that the family refuses, or sizes that do not go together or into memory.
        """
        config = validate(self.config_type, dict(settings), where)
        try:
            return self.build(config)
        except UsageError:
            raise
        except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
            got = " ".join(str(error).split()) or type(error).__name__
            raise UsageError.of(
                where, expected="sizes that go together and into memory", got=got, fix="correct the sizes"
            ) from error


FAMILIES: Registry[Family] = Registry("family")


def add_family(name: str, config_type: type[ModelConfig]) -> Callable[[type], type]:
    """Class decorator that registers a model family."""

    def add(model_type: type) -> type:
        model_type.family = name
        FAMILIES.register(name)(Family(name, config_type, model_type))
        return model_type

    return add
