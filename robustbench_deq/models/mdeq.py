"""`mdeq`: the multi-scale DEQ; branches at several resolutions that exchange features in every cell evaluation.

With branches `z_i` of `C_i` channels at `1 / 2^i` of the finest resolution, one cell evaluation is

    h_i = GN(relu(GN(conv_2(relu(GN(conv_1(z_i)))) + [i = 0] u) + z_i))      residual block, `expansion` times wider
    z_i' = GN(conv_i(relu(sum_j T_ji(h_j))))                                 fusion

where `T_ii` is the identity, `T_ji` for j < i halves the resolution `i - j` times by strided convolutions, and for j >
i is a 1x1 convolution and nearest-neighbour upsampling. The state packs all branches, flattened, into `(batch, size)`.
Logits: each branch goes through a bottleneck to its head channels, the branches are summed downwards to the coarsest
resolution, averaged over space and read out linearly.

Source: Bai, Koltun, Kolter, "Multiscale deep equilibrium models", NeurIPS 2020, Eqs. 4-6; the two-branch classifier (24
channels each, heads of 8 and 16; size `small`) is that of Gurumurthy et al., NeurIPS 2021, and the four branches of
size `base` are those of Bai et al. for CIFAR-10. Departures: group norm throughout, without running statistics, so that
no sample sees its batch mates and train and eval mode agree; no dropout; no 1x1 convolution between the head's coarsest
resolution and the average.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robustbench_deq.models.base import FamilyModel, Size, SizedConfig, Sizes, add_family

HEAD_EXPANSION = 4


class MDEQConfig(SizedConfig):
    sizes: ClassVar[Sizes] = {
        "small": {"channels": (24, 24), "head_channels": (8, 16)},
        "base": {"channels": (32, 64, 128, 256), "head_channels": (14, 28, 56, 112), "has_weight_norm": True},
    }

    channels: tuple[Size, ...] = Field((24, 24), min_length=1, description="channels of each branch")
    head_channels: tuple[Size, ...] = Field((8, 16), description="bottleneck of each branch in the head")
    groups: int = Field(8, ge=1, description="groups of the group norms; divides every number of channels")
    expansion: int = Field(5, ge=1, le=64, description="width of a residual block over its branch's channels")
    stem_strides: tuple[Size, ...] = Field((1,), min_length=1, description="strides of the stem's convolutions")
    has_weight_norm: bool = Field(False, description="reparametrise the cell's convolutions by norm and direction")
    init_scale: float = Field(0.1, gt=0, description="factor on the initial gain of every way from the state to itself")

    @model_validator(mode="after")
    def _check(self) -> MDEQConfig:
        if len(self.head_channels) != len(self.channels):
            raise ValueError(f"as many head_channels as channels ({len(self.channels)})")
        if any(count % self.groups for count in self.channels):
            raise ValueError(f"channels {self.channels} that are multiples of groups ({self.groups})")
        if any(HEAD_EXPANSION * count % self.groups for count in self.head_channels):
            raise ValueError(
                f"{HEAD_EXPANSION} * head_channels {self.head_channels} to be multiples of groups ({self.groups})"
            )
        return self


class _Block(nn.Module):
    """The residual block of one branch."""

    def __init__(self, channels: int, expansion: int, groups: int) -> None:
        super().__init__()
        width = channels * expansion
        self.conv_1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(groups, width)
        self.norm_2 = nn.GroupNorm(groups, channels)
        self.norm_3 = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        inner = self.conv_2(F.relu(self.norm_1(self.conv_1(z))))
        return self.norm_3(F.relu(self.norm_2(inner if u is None else inner + u) + z))


class _Transfer(nn.Module):
    """`T_ji`: branch j at the resolution and with the channels of branch i."""

    def __init__(self, source: int, target: int, channels: tuple[int, ...], groups: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if target > source:
            for step in range(source, target):
                out = channels[target] if step == target - 1 else channels[source]
                layers += [
                    nn.Conv2d(channels[source], out, 3, stride=2, padding=1, bias=False),
                    nn.GroupNorm(groups, out),
                ]
                if step != target - 1:
                    layers.append(nn.ReLU())
        else:
            layers += [
                nn.Conv2d(channels[source], channels[target], 1, bias=False),
                nn.GroupNorm(groups, channels[target]),
            ]
        self.layers = nn.Sequential(*layers)
        self.is_upward = source > target

    def forward(self, h: Tensor, size: tuple[int, int]) -> Tensor:
        out = self.layers(h)
        return out if out.shape[-2:] == size else F.interpolate(out, size=size, mode="nearest")


@add_family("mdeq", MDEQConfig)
class MDEQ(FamilyModel):
    """State `(batch, sum of channels * rows * columns over the branches)`."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__(config)
        colours, rows, columns = config.input_shape
        channels, groups = config.channels, config.groups
        self.stem = nn.Sequential()
        inputs = colours
        for stride in config.stem_strides:
            self.stem.extend(
                [nn.Conv2d(inputs, channels[0], 3, stride=stride, padding=1), nn.GroupNorm(groups, channels[0])]
            )
            self.stem.append(nn.ReLU())
            inputs = channels[0]
            rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
        self.stem.pop(-1)
        self.sizes = [(math.ceil(rows / 2**i), math.ceil(columns / 2**i)) for i in range(len(channels))]
        self.blocks = nn.ModuleList(_Block(count, config.expansion, groups) for count in channels)
        self.transfers = nn.ModuleDict(
            {
                f"{source}_{target}": _Transfer(source, target, channels, groups)
                for source in range(len(channels))
                for target in range(len(channels))
                if source != target
            }
        )
        self.fusions = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(count, count, 1, bias=False), nn.GroupNorm(groups, count))
            for count in channels
        )
        self._damp_feedback(config.init_scale)
        if config.has_weight_norm:
            for module in nn.ModuleList([self.blocks, self.transfers, self.fusions]).modules():
                if isinstance(module, nn.Conv2d):
                    weight_norm(module)
        self.bottlenecks = nn.ModuleList(
            _Bottleneck(count, head, groups) for count, head in zip(channels, config.head_channels, strict=True)
        )
        widths = [HEAD_EXPANSION * head for head in config.head_channels]
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.GroupNorm(groups, second), nn.ReLU())
            for first, second in itertools.pairwise(widths)
        )
        self.readout = nn.Linear(widths[-1], config.num_classes)

    def _damp_feedback(self, scale: float) -> None:
        """Scale what leads from the state back to itself beside the injection, or the untrained cell has no equilibrium
        that a solver finds: the residual branches, the skips (by the fusions that feed them), the coarser branches'
        own features and what they send upwards."""
        gains = [block.conv_2 for block in self.blocks] + [block.norm_3 for block in self.blocks[1:]]
        gains += [fusion[-1] for fusion in self.fusions]
        gains += [transfer.layers[-1] for transfer in self.transfers.values() if transfer.is_upward]
        for gain in gains:
            gain.weight.data.mul_(scale)

    def inject(self, x: Tensor) -> Tensor:
        return self.stem(self.normalise(x))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        branches = self._unpack(z)
        hidden = [
            block(z_i, u if i == 0 else None) for i, (block, z_i) in enumerate(zip(self.blocks, branches, strict=True))
        ]
        fused = []
        for target, fusion in enumerate(self.fusions):
            total = hidden[target]
            for source, h in enumerate(hidden):
                if source != target:
                    total = total + self.transfers[f"{source}_{target}"](h, self.sizes[target])
            fused.append(fusion(total))
        return torch.cat([part.flatten(1) for part in fused], dim=1)

    def head(self, z: Tensor) -> Tensor:
        features = [bottleneck(z_i) for bottleneck, z_i in zip(self.bottlenecks, self._unpack(z), strict=True)]
        total = features[0]
        for down, feature in zip(self.downs, features[1:], strict=True):
            total = feature + down(total)
        return self.readout(total.mean((2, 3)))

    def initial_state(self, u: Tensor) -> Tensor:
        size = sum(
            count * rows * columns for count, (rows, columns) in zip(self.config.channels, self.sizes, strict=True)
        )
        return u.new_zeros(len(u), size)

    def _unpack(self, z: Tensor) -> list[Tensor]:
        shapes = [(count, *size) for count, size in zip(self.config.channels, self.sizes, strict=True)]
        parts = z.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


class _Bottleneck(nn.Module):
    """The head's block of one branch: to `HEAD_EXPANSION * head` channels, with a projected skip."""

    def __init__(self, channels: int, head: int, groups: int) -> None:
        super().__init__()
        out = HEAD_EXPANSION * head
        self.inner = nn.Sequential(
            nn.Conv2d(channels, head, 1, bias=False),
            nn.GroupNorm(math.gcd(groups, head), head),
            nn.ReLU(),
            nn.Conv2d(head, head, 3, padding=1, bias=False),
            nn.GroupNorm(math.gcd(groups, head), head),
            nn.ReLU(),
            nn.Conv2d(head, out, 1, bias=False),
            nn.GroupNorm(groups, out),
        )
        self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.GroupNorm(groups, out))

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(self.inner(z) + self.skip(z))
