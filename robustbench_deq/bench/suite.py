"""Suites: models x attacks x threats x seeds, from a YAML file, as a list of runs, each cut into shards.

A run becomes one record. A shard is a range of its samples, whole batches of them, and the unit of work: what it gives
depends on nothing but its run and its range, so shards may be done anywhere, in any order, once or twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from robustbench_deq.attack import ATTACKS
from robustbench_deq.bench.records import SCHEMA_VERSION
from robustbench_deq.configs import Config, merge, parse_fraction, read_yaml, validate
from robustbench_deq.data import SplitName, load
from robustbench_deq.errors import UsageError
from robustbench_deq.models import MODELS, describe_model
from robustbench_deq.threats import Norm


class AttackPlan(Config):
    name: str = Field("joint-pgd", description="a registered attack")
    label: str | None = Field(None, description="its name in tables; the settings of the grid are added to it")
    config: dict[str, Any] = Field(default_factory=dict, description="the attack's own settings")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="settings, each with the values it takes")

    def variants(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Label and settings of every point of the grid."""
        for values in itertools.product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            words = [self.label or self.name, *(f"{key}={value}" for key, value in point.items())]
            yield " ".join(words), merge(self.config, point)


class ThreatPlan(Config):
    norm: str = Field("l2", description="l2 or linf")
    epsilons: list[float] = Field(min_length=1, description="radii in pixel units of [0, 1]; may be written 8/255")

    @field_validator("epsilons", mode="before")
    @classmethod
    def _fractions(cls, values: object) -> object:
        if not isinstance(values, list):
            return values
        return [parse_fraction(value) if isinstance(value, str) else value for value in values]


class SuiteConfig(Config):
    """A suite as its file says it."""

    name: str = Field(description="of the suite and its default output folder")
    models: list[str] = Field(min_length=1, description="names, wildcards, folders or file.py:function")
    attacks: list[AttackPlan] = Field(min_length=1)
    threats: list[ThreatPlan] | None = Field(None, description="null: the threat of each model's card")
    data: str | None = Field(None, description="a dataset or npz:FILE; null: that of each model's card")
    split: Literal["train", "validation", "test"] = "test"
    limit: int = Field(256, ge=1, description="samples of a run; at most those of the split")
    seeds: list[int] = Field([0], min_length=1)
    batch_size: int = Field(128, ge=1)
    batches_per_shard: int = Field(1, ge=1, description="batches of a shard")
    num_snapshots: int = Field(8, ge=0, description="points of the accuracy-against-cost curves")


class Run(Config):
    """Everything that determines one record, but for what the machine adds."""

    model: str
    model_sha256: str | None
    attack: str
    label: str
    config: dict[str, Any]
    norm: str
    epsilon: float
    data: str
    split: str
    digest: str
    num_samples: int
    seed: int
    batch_size: int
    num_snapshots: int

    @property
    def key(self) -> str:
        """Names the run: a digest of all of it and of the records' schema."""
        content = json.dumps([SCHEMA_VERSION, self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Shard(Config):
    """Samples `begin` to `end` of a run."""

    run: Run
    begin: int
    end: int

    @property
    def key(self) -> str:
        return f"{self.run.key}-{self.begin:06d}-{self.end:06d}"


def read_suite(path: Path) -> SuiteConfig:
    return validate(SuiteConfig, read_yaml(path), str(path))


def plan(suite: SuiteConfig) -> list[Run]:
    """All runs, model by model.

    Raises:
        UsageError: for unknown names, settings that an attack refuses, a model whose card lacks what the suite leaves
            to it, or two runs that are the same.
    """
    runs: dict[str, Run] = {}
    for model in dict.fromkeys(name for pattern in suite.models for name in _expand(pattern)):
        is_file = ".py:" in model
        described = None if is_file else describe_model(model)
        known = described.card.evaluation if described else {}
        data = suite.data or (described.card.data if described else "") or None
        if data is None:
            raise UsageError.of(f"suite: model {model}", expected="data", got="none in its card", fix="set data")
        split = load(data, SplitName(suite.split))
        split = load(data, SplitName(suite.split), min(suite.limit, len(split)))
        for (norm, epsilon), spec, seed in itertools.product(_threats(suite, model, known), suite.attacks, suite.seeds):
            for label, config in spec.variants():
                validate(ATTACKS.get(spec.name).config_type, config, f"suite: attack {label}")
                run = Run(
                    model=model,
                    model_sha256=(described.sha256 or None) if described else None,
                    attack=spec.name,
                    label=label,
                    config=config,
                    norm=norm,
                    epsilon=epsilon,
                    data=data,
                    split=suite.split,
                    digest=split.digest,
                    num_samples=len(split),
                    seed=seed,
                    batch_size=suite.batch_size,
                    num_snapshots=suite.num_snapshots,
                )
                if run.key in runs:
                    raise UsageError.of("suite", expected="different runs", got=f"{label} twice", fix="drop one")
                runs[run.key] = run
    return list(runs.values())


def cut(run: Run, batches_per_shard: int) -> list[Shard]:
    size = run.batch_size * batches_per_shard
    return [
        Shard(run=run, begin=begin, end=min(begin + size, run.num_samples)) for begin in range(0, run.num_samples, size)
    ]


def _expand(pattern: str) -> list[str]:
    """Registered names that match, or the pattern itself where it names a folder or a file."""
    if ".py:" in pattern or Path(pattern).is_dir():
        return [pattern]
    names = MODELS.list(pattern)
    if not names:
        MODELS.get(pattern)
    return names


def _threats(suite: SuiteConfig, model: str, known: dict[str, Any]) -> list[tuple[str, float]]:
    if suite.threats is not None:
        return [(Norm.parse(threat.norm).value, epsilon) for threat in suite.threats for epsilon in threat.epsilons]
    if "epsilon" not in known:
        raise UsageError.of(f"suite: model {model}", expected="a threat", got="none in its card", fix="set threats")
    return [(known.get("norm", "l2"), float(known["epsilon"]))]
