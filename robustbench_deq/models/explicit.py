"""Explicit twins of the DEQs: networks without an equilibrium, behind the same interface.

The cell does not look at its state, so one evaluation reaches its fixed point, and every attack, solver and judge works
on it unchanged. A cell evaluation is a forward pass, its VJP a backward pass. A solve spends a second evaluation to see
that it is there; gradients by default are Jacobian-free, which is exact here. The joint iteration becomes PGD with one
forward and one backward pass a step, whose loss gradient with respect to the features is that at the features of the
last step.

    unrolled    f(z, u) = g_K, g_0 = z_0(u), g_{k+1} = cell(g_k, u): a DEQ's own cell, weight-tied, K times
    resnet      f(z, u) = features of a plain residual network with group norm (He et al., CVPR 2016)
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor, nn

from robustbench_deq.models.base import FAMILIES, FamilyModel, ModelConfig, Size, add_family, iterates
from robustbench_deq.specs import AdjointSpec, SolveSpec


class ExplicitConfig(ModelConfig):
    solve: SolveSpec = Field(SolveSpec(solver="picard", max_steps=2), description="one evaluation, and one to see it")
    adjoint: AdjointSpec = Field(AdjointSpec(name="jacobian-free"), description="exact without a state")


class UnrolledConfig(ExplicitConfig):
    cell: str = Field("deq-conv", description="the family whose cell is unrolled")
    cell_config: dict[str, JsonValue] = Field(default_factory=dict, description="that family's settings")
    num_steps: int = Field(8, ge=1, le=1000, description="K, applications of the cell")

    @field_validator("cell")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        FAMILIES.get(name)
        return name

    @field_validator("cell_config")
    @classmethod
    def _is_the_cells_own(cls, values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if shared := sorted(values.keys() & ModelConfig.model_fields.keys()):
            raise ValueError(f"no {shared[0]}, which belongs beside cell_config")
        return values


@add_family("unrolled", UnrolledConfig)
class UnrolledNetwork(FamilyModel):
    """State like that of the unrolled family."""

    is_explicit = True

    def __init__(self, config: UnrolledConfig) -> None:
        super().__init__(config)
        family = FAMILIES.get(config.cell)
        shared = {name: getattr(config, name) for name in ModelConfig.model_fields}
        self.deq = family.make({**shared, **config.cell_config}, f"model {config.cell}")

    def inject(self, x: Tensor) -> Tensor:
        return self.deq.inject(x)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        *_, last = iterates(self.deq, u, self.config.num_steps)
        return last

    def head(self, z: Tensor) -> Tensor:
        return self.deq.head(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return self.deq.initial_state(u)


class ResNetConfig(ExplicitConfig):
    channels: tuple[Size, ...] = Field((24, 48), min_length=1, description="channels of each stage")
    blocks: int = Field(
        1, ge=1, le=100, description="residual blocks a stage; each stage but the first halves the resolution"
    )
    groups: int = Field(8, ge=1, description="groups of the group norms; divides every number of channels")
    stem_stride: int = Field(2, ge=1, description="stride of the first convolution")

    @model_validator(mode="after")
    def _check_groups(self) -> ResNetConfig:
        if any(count % self.groups for count in self.channels):
            raise ValueError(f"channels {self.channels} that are multiples of groups ({self.groups})")
        return self


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(groups, outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(groups, outputs)
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, h: Tensor) -> Tensor:
        inner = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(h)))))
        return F.relu(inner + self.skip(h))


@add_family("resnet", ResNetConfig)
class ResNet(FamilyModel):
    """State `(batch, channels of the last stage)`: the features averaged over space."""

    is_explicit = True

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        first = config.channels[0]
        self.stem = nn.Conv2d(config.input_shape[0], first, 3, stride=config.stem_stride, padding=1)
        self.norm = nn.GroupNorm(config.groups, first)
        blocks: list[nn.Module] = []
        inputs = first
        for stage, outputs in enumerate(config.channels):
            for block in range(config.blocks):
                stride = 2 if stage and not block else 1
                blocks.append(_ResidualBlock(inputs, outputs, stride, config.groups))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.readout = nn.Linear(inputs, config.num_classes)

    def inject(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stem(self.normalise(x))))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.blocks(u).mean((2, 3))

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(len(u), self.config.channels[-1])
