"""What every model family shares: a typed config, and its place in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pydantic import Field, PositiveInt

from robustbench_deq.configs import Config
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.registry import Registry


class ModelConfig(Config):
    """Shape of the data and its normalisation, which lives inside the model."""

    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="channels, height, width")
    num_classes: int = Field(10, ge=2, description="number of classes")
    pixel_mean: float = Field(0.0, description="subtracted from every pixel")
    pixel_std: float = Field(1.0, gt=0, description="divides every pixel")


class Family(NamedTuple):
    name: str
    config_type: type[ModelConfig]
    build: Callable[[ModelConfig], EquilibriumModel]


FAMILIES: Registry[Family] = Registry("family")


def add_family(name: str, config_type: type[ModelConfig]) -> Callable[[type], type]:
    """Class decorator that registers a model family."""

    def add(model_type: type) -> type:
        model_type.family = name
        FAMILIES.register(name)(Family(name, config_type, model_type))
        return model_type

    return add
