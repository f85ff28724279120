"""`deq-conv`: a small convolutional residual cell with group norm.

    u       = GN(conv_b(relu(GN(conv_a(normalise(x))))))          a stride of 4 in all
    f(z, u) = GN(relu(u + conv_2(GN(relu(conv_1(z))))))
    logits  = W vec(z) + b

Group norm acts on each sample alone and has no running statistics, so train and eval mode agree and no sample sees its
batch mates. The last group norm keeps the state bounded. As options, the cell's kernels as norms and directions, and no
group norm (`groups` 0): then the untrained cell contracts more, and nothing keeps the trained one bounded.

Source: the residual cell of Bai, Koltun, Kolter, "Multiscale deep equilibrium models", NeurIPS 2020, Eq. 4-5, on a
single scale. Departure: the residual branch is added to the injection alone. A skip from z to f(z) puts an eigenvalue
near one into the Jacobian, and the solves of the untrained cell then take more than 50 steps.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robustbench_deq.models.base import FamilyModel, Size, SizedConfig, Sizes, add_family, group_norm


class DEQConvConfig(SizedConfig):
    sizes: ClassVar[Sizes] = {
        "tiny": {"channels": 16, "groups": 4},
        "small": {"channels": 48, "groups": 8},
        "base": {"channels": 96, "groups": 8},
    }

    channels: int = Field(48, ge=2, le=4096, description="channels of the state and inside the cell; even")
    groups: int = Field(8, ge=0, description="groups of the group norms, which divide half of channels; 0: none")
    strides: tuple[Size, Size] = Field((2, 2), description="strides of the injection's two convolutions")
    init_scale: float = Field(0.5, gt=0, description="factor on the default initialisation of the cell's convolutions")
    has_weight_norm: bool = Field(False, description="reparametrise the cell's convolutions by norm and direction")

    @model_validator(mode="after")
    def _check_groups(self) -> DEQConvConfig:
        factor = 2 * max(self.groups, 1)
        if self.channels % factor:
            raise ValueError(f"channels ({self.channels}) that are a multiple of 2 * groups ({factor})")
        return self


@add_family("deq-conv", DEQConvConfig)
class DEQConv(FamilyModel):
    """State `(batch, channels, rows, columns)`: the image's sides divided by both strides, rounded up."""

    def __init__(self, config: DEQConvConfig) -> None:
        super().__init__(config)
        colours, height, width = config.input_shape
        channels, groups = config.channels, config.groups
        self.conv_a = nn.Conv2d(colours, channels // 2, 5, stride=config.strides[0], padding=2)
        self.norm_a = group_norm(groups, channels // 2)
        self.conv_b = nn.Conv2d(channels // 2, channels, 3, stride=config.strides[1], padding=1)
        self.norm_b = group_norm(groups, channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_1 = group_norm(groups, channels)
        self.norm_2 = group_norm(groups, channels)
        for conv in (self.conv_1, self.conv_2):
            conv.weight.data.mul_(config.init_scale)
            if config.has_weight_norm:
                weight_norm(conv)
        first, second = config.strides
        rows, columns = (-(-(-(-length // first)) // second) for length in (height, width))
        self.readout = nn.Linear(channels * rows * columns, config.num_classes)

    def inject(self, x: Tensor) -> Tensor:
        inner = self.norm_a(space_to_depth_conv(self.conv_a, self.normalise(x)))
        return self.norm_b(self.conv_b(F.relu(inner)))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        inner = self.norm_1(F.relu(self.conv_1(z)))
        return self.norm_2(F.relu(u + self.conv_2(inner)))

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z.flatten(1))

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)


def space_to_depth_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv`, of a square kernel and stride s, makes of `x`: a convolution of stride 1 on blocks of s x s pixels.

    A strided convolution of few input channels, and its gradient above all, leaves most of a processor's vector units
    idle; moving the pixels of a block into the channels takes half the time or less. The kernel is padded with zeros to
    a multiple of s.
    """
    stride, size, padding = conv.stride[0], conv.kernel_size[0], conv.padding[0]
    if stride == 1:
        return conv(x)
    blocks = -(-size // stride)
    rows, columns = ((length + 2 * padding - size) // stride + blocks for length in x.shape[-2:])
    below, right = (
        stride * count - length - padding for count, length in zip((rows, columns), x.shape[-2:], strict=True)
    )
    x = F.pixel_unshuffle(F.pad(x, (padding, right, padding, below)), stride)
    gap = stride * blocks - size
    weight = F.pixel_unshuffle(F.pad(conv.weight, (0, gap, 0, gap)), stride)
    return F.conv2d(x, weight, conv.bias)
