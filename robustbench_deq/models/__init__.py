"""One DEQ family a file; saved models and the zoo of registered ones."""

from robustbench_deq.models.base import FAMILIES, Family, FamilyModel, ModelConfig, SizedConfig
from robustbench_deq.models.deq_conv import DEQConv, DEQConvConfig
from robustbench_deq.models.deq_fc import DEQFC, DEQFCConfig
from robustbench_deq.models.explicit import ResNet, ResNetConfig, UnrolledConfig, UnrolledNetwork
from robustbench_deq.models.io import (
    Card,
    ModelDescription,
    describe_model,
    list_models,
    load_folder,
    load_model,
    save_model,
)
from robustbench_deq.models.lben import LBEN, LBENConfig
from robustbench_deq.models.linear import Linear, LinearConfig
from robustbench_deq.models.mdeq import MDEQ, MDEQConfig
from robustbench_deq.models.mondeq_conv import MonDEQConv, MonDEQConvConfig
from robustbench_deq.models.mondeq_fc import MonDEQFC, MonDEQFCConfig
from robustbench_deq.models.mondeq_multi import MonDEQMulti, MonDEQMultiConfig
from robustbench_deq.models.origin import Origin, origin_of
from robustbench_deq.models.torchdeq import from_torchdeq
from robustbench_deq.models.zoo import MODELS

__all__ = [
    "DEQFC",
    "FAMILIES",
    "LBEN",
    "MDEQ",
    "MODELS",
    "Card",
    "DEQConv",
    "DEQConvConfig",
    "DEQFCConfig",
    "Family",
    "FamilyModel",
    "LBENConfig",
    "Linear",
    "LinearConfig",
    "MDEQConfig",
    "ModelConfig",
    "ModelDescription",
    "MonDEQConv",
    "MonDEQConvConfig",
    "MonDEQFC",
    "MonDEQFCConfig",
    "MonDEQMulti",
    "MonDEQMultiConfig",
    "Origin",
    "ResNet",
    "ResNetConfig",
    "SizedConfig",
    "UnrolledConfig",
    "UnrolledNetwork",
    "describe_model",
    "from_torchdeq",
    "list_models",
    "load_folder",
    "load_model",
    "origin_of",
    "save_model",
]
