"""One DEQ family a file; saved models and the zoo of registered ones."""

from typing import TYPE_CHECKING

from robustbench_deq.lazy import names_of

if TYPE_CHECKING:
    from robustbench_deq.models.base import Family, FamilyModel, ModelConfig, SizedConfig
    from robustbench_deq.models.cards import Card, ModelDescription, describe_model, list_models
    from robustbench_deq.models.deq_conv import DEQConv, DEQConvConfig
    from robustbench_deq.models.deq_fc import DEQFC, DEQFCConfig
    from robustbench_deq.models.explicit import ResNet, ResNetConfig, UnrolledConfig, UnrolledNetwork
    from robustbench_deq.models.families import FAMILIES
    from robustbench_deq.models.io import load_folder, load_model, save_model
    from robustbench_deq.models.lben import LBEN, LBENConfig
    from robustbench_deq.models.linear import Linear, LinearConfig
    from robustbench_deq.models.mdeq import MDEQ, MDEQConfig
    from robustbench_deq.models.mondeq_conv import MonDEQConv, MonDEQConvConfig
    from robustbench_deq.models.mondeq_fc import MonDEQFC, MonDEQFCConfig
    from robustbench_deq.models.mondeq_multi import MonDEQMulti, MonDEQMultiConfig
    from robustbench_deq.models.origin import Origin, origin_of
    from robustbench_deq.models.torchdeq import from_torchdeq
    from robustbench_deq.models.zoo import MODELS

_PLACES = {
    "DEQFC": "deq_fc",
    "FAMILIES": "families",
    "LBEN": "lben",
    "MDEQ": "mdeq",
    "MODELS": "zoo",
    "Card": "cards",
    "DEQConv": "deq_conv",
    "DEQConvConfig": "deq_conv",
    "DEQFCConfig": "deq_fc",
    "Family": "base",
    "FamilyModel": "base",
    "LBENConfig": "lben",
    "Linear": "linear",
    "LinearConfig": "linear",
    "MDEQConfig": "mdeq",
    "ModelConfig": "base",
    "ModelDescription": "cards",
    "MonDEQConv": "mondeq_conv",
    "MonDEQConvConfig": "mondeq_conv",
    "MonDEQFC": "mondeq_fc",
    "MonDEQFCConfig": "mondeq_fc",
    "MonDEQMulti": "mondeq_multi",
    "MonDEQMultiConfig": "mondeq_multi",
    "Origin": "origin",
    "ResNet": "explicit",
    "ResNetConfig": "explicit",
    "SizedConfig": "base",
    "UnrolledConfig": "explicit",
    "UnrolledNetwork": "explicit",
    "describe_model": "cards",
    "from_torchdeq": "torchdeq",
    "list_models": "cards",
    "load_folder": "io",
    "load_model": "io",
    "origin_of": "origin",
    "save_model": "io",
}
"""The module of each name."""

__getattr__, __dir__ = names_of(__name__, _PLACES)

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
