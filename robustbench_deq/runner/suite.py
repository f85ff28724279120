"""Suites: models x data x threats x attacks x budgets x solvers x seeds, from a YAML file, as a list of runs.

Budgets and solvers are axes over settings of the attacks: `steps`, `max_evaluations`, `max_seconds` and `solver`. An
attack without such a setting is run once, whatever the axis; an axis that no attack of the suite has is refused.

A run becomes one record. A shard is a range of its samples, whole batches of them, and the unit of work: what it gives
depends on nothing but its run and its range, so shards may be done anywhere, in any order, once or twice. (Only a
budget of seconds makes the result depend on the machine.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from robustbench_deq.configs import MAX_COUNT, Config, Distinct, FolderName, merge, named_in, read_yaml, validate
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.errors import UsageError
from robustbench_deq.files import is_folder
from robustbench_deq.fixes import shape_fix
from robustbench_deq.models import MODELS, ModelDescription, describe_model
from robustbench_deq.models.cards import names_function
from robustbench_deq.models.user_file import digest_of_file
from robustbench_deq.protocol import ATTACKS
from robustbench_deq.records.record import SCHEMA_VERSION
from robustbench_deq.solvers import SOLVERS
from robustbench_deq.specs import AttackSpec
from robustbench_deq.threat_spec import NormName, Radius, ThreatSpec

Axis = list[dict[str, Any]]
"""Points of an axis of the suite, each as settings of an attack."""
MAX_RUNS = 10_000
MAX_SHARDS = 100_000


class AttackGrid(Config):
    """An attack with settings to combine: a list of `AttackSpec`."""

    name: str = Field("joint-pgd", description="a registered attack")
    label: str | None = Field(
        None, max_length=200, description="its name in tables; the settings of the grid are added to it"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="the attack's own settings")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="settings, each with the values it takes"
    )

    def variants(self, axes: Sequence[Axis]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Label and settings of every point of the grid and of those of the suite's axes that the attack has.

        Raises:
            UsageError: when the attack sets by itself what an axis sets.
        """
        grid = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        own = self._own(axes)
        for key in {key for axis in own for point in axis for key in point} & {*self.config, *self.grid}:
            raise UsageError.of(
                f"suite: attack {self.label or self.name}",
                expected=f"one place for {key}",
                got="the attack's own settings and those of the suite",
                fix="drop one",
            )
        for points in itertools.product(grid, *own):
            point = {key: value for part in points for key, value in part.items()}
            words = [self.label or self.name, *(f"{key}={_text(value)}" for key, value in point.items())]
            yield " ".join(words), merge(self.config, point)

    def num_variants(self, axes: Sequence[Axis]) -> int:
        """How many `variants` there are, without making them."""
        return math.prod(map(len, [*self.grid.values(), *self._own(axes)]))

    def _own(self, axes: Sequence[Axis]) -> list[Axis]:
        """Of each axis the points that the attack has settings for."""
        known = ATTACKS.get(self.name).config_type.model_fields
        return [[point for point in axis if point.keys() <= known.keys()] or [{}] for axis in axes]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Budget(Config):
    """What a run may spend; at least one of the three. The attack returns its last iterate within all of them."""

    steps: int | None = Field(None, ge=1, description="the attack's own steps")
    evaluations: float | None = Field(None, gt=0, description="cell evaluations per sample, mean of a batch")
    seconds: float | None = Field(None, gt=0, description="per sample; what comes out depends on the machine")

    @model_validator(mode="after")
    def _is_some(self) -> Budget:
        if not self.settings():
            raise ValueError("steps, evaluations or seconds")
        return self

    def settings(self) -> dict[str, Any]:
        """As settings of an attack."""
        values = {"steps": self.steps, "max_evaluations": self.evaluations, "max_seconds": self.seconds}
        return {key: value for key, value in values.items() if value is not None}


class ThreatGrid(Config):
    """A norm with several radii: a list of `ThreatSpec`."""

    norm: NormName = Field("l2", description="l1, l2 or linf")
    epsilons: Annotated[list[Radius], Distinct] = Field(
        min_length=1, description="radii in pixel units of [0, 1]; may be written 8/255"
    )

    def specs(self) -> list[ThreatSpec]:
        return [ThreatSpec(norm=self.norm, epsilon=epsilon) for epsilon in self.epsilons]


class Resources(Config):
    """Of one shard on a Ray cluster."""

    num_cpus: float = Field(1.0, gt=0, description="and as many threads, at least one")
    num_gpus: float | None = Field(None, ge=0, description="null: 1 on a cluster with GPUs unless --device cpu, else 0")


class SuiteConfig(Config):
    """A suite as its file says it."""

    name: FolderName = Field(description="of the suite and its default output folder")
    models: Annotated[list[str], Distinct] = Field(
        min_length=1, description="names, wildcards, folders or file.py:function"
    )
    attacks: list[AttackGrid] = Field(min_length=1)
    threats: list[ThreatGrid] | None = Field(None, min_length=1, description="null: the threat of each model's card")
    data: Annotated[str | Annotated[list[str], Field(min_length=1)] | None, Distinct] = Field(
        None, description="a dataset or npz:FILE, or several; null: that of each model's card"
    )
    split: Literal["train", "validation", "test", "all"] = Field("test", description="all: every sample of npz:FILE")
    limit: int = Field(256, ge=1, description="samples of a run; at most those of the split")
    budgets: Annotated[list[Budget], Distinct] | None = Field(
        None, min_length=1, description="null: what the attacks' settings say"
    )
    solvers: Annotated[list[Annotated[str, named_in(SOLVERS)]], Distinct] | None = Field(
        None, min_length=1, description="of the attacks' equilibrium solves; null: what their settings say"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=MAX_COUNT)]], Distinct] = Field([0], min_length=1)
    batch_size: int = Field(128, ge=1)
    batches_per_shard: int = Field(1, ge=1, description="batches of a shard")
    num_snapshots: int = Field(8, ge=0, le=1000, description="points of the accuracy-against-cost curves")
    resources: Resources = Resources()

    @field_validator("threats")
    @classmethod
    def _check_threats(cls, threats: list[ThreatGrid] | None) -> list[ThreatGrid] | None:
        specs = [spec for grid in threats or () for spec in grid.specs()]
        if len({(spec.norm, spec.epsilon) for spec in specs}) < len(specs):
            raise ValueError("every threat once")
        return threats

    def axes(self) -> list[Axis]:
        """Budgets and solvers, as far as the suite has them.

        Raises:
            UsageError: for one that no attack of the suite has a setting for.
        """
        named = {
            "budgets": [budget.settings() for budget in self.budgets or ()],
            "solvers": [{"solver": solver} for solver in self.solvers or ()],
        }
        for name, axis in named.items():
            for point in axis:
                kinds = [ATTACKS.get(attack.name).config_type for attack in self.attacks]
                if not any(set(point) <= set(kind.model_fields) for kind in kinds):
                    settings = " and ".join(point)
                    raise UsageError.of(
                        f"suite: {name}", expected=f"an attack with {settings}", got="none", fix=f"drop {name}"
                    )
        return [axis for axis in named.values() if axis]


class Run(Config):
    """Everything that determines one record, but for the code of this package and what the machine adds.

    Attributes:
        model_digest: of all that makes the model, see `digest_of_model`.
        model_sha256, file_sha256: of its weights, or of its file, as the record has them.
        config: every setting of the attack, the defaults too.
        digest: of the samples.
    """

    model: str
    model_digest: str
    model_sha256: str | None
    file_sha256: str | None
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
            to it, two runs of one name, or more than `MAX_RUNS` runs or `MAX_SHARDS` shards.
    """
    runs: dict[tuple[Any, ...], Run] = {}
    splits: dict[str, Split] = {}
    axes, attacks = suite.axes(), suite.attacks
    num_variants = sum(grid.num_variants(axes) for grid in attacks)
    num_runs = num_shards = 0
    for model in dict.fromkeys(name for pattern in suite.models for name in _expand(pattern)):
        described, model_digest = _describe(model), digest_of_model(model)
        for name in _data(suite, model, described):
            split = splits[name] = splits.get(name) or _load(name, suite)
            _check_shape(model, described, split)
            threats = _threats(suite, model, described)
            more = num_variants * len(threats) * len(suite.seeds)
            num_runs += more
            num_shards += more * math.ceil(len(split) / (suite.batch_size * suite.batches_per_shard))
            _check_size(num_runs, num_shards)
            for threat, grid, seed in itertools.product(threats, attacks, suite.seeds):
                for label, config in grid.variants(axes):
                    chosen = AttackSpec(name=grid.name, threat=threat, config=config)
                    attack = chosen.build(f"suite: attack {label}")
                    run = Run(
                        model=model,
                        model_digest=model_digest,
                        model_sha256=(described.sha256 or None) if described else None,
                        file_sha256=None if described else model_digest,
                        attack=grid.name,
                        label=label,
                        config=attack.config.model_dump(mode="json"),
                        norm=threat.norm,
                        epsilon=threat.epsilon,
                        data=name,
                        split=suite.split,
                        digest=split.digest,
                        num_samples=len(split),
                        seed=seed,
                        batch_size=suite.batch_size,
                        num_snapshots=suite.num_snapshots,
                    )
                    name_of_run = (model, name, threat.norm, threat.epsilon, label, seed)
                    if name_of_run in runs:
                        raise UsageError.of(
                            "suite", expected="different labels", got=f"{label} twice", fix="give the attacks labels"
                        )
                    runs[name_of_run] = run
    return list(runs.values())


def _check_size(num_runs: int, num_shards: int) -> None:
    """Before they are made: a few lists multiply out to more than fits into memory."""
    for count, most, kind in ((num_runs, MAX_RUNS, "runs"), (num_shards, MAX_SHARDS, "shards")):
        if count > most:
            fix = "shorten a list or a grid, or make several suites" + ", or raise batch_size" * (kind == "shards")
            raise UsageError.of("suite", expected=f"at most {most} {kind}", got=f"{count} or more", fix=fix)


def digest_of_model(model: str) -> str:
    """Of a model's family, settings and weights; of a `file.py:function` the text of the file, and of the modules that
    it imports from beside it. What such code reads is not looked into.

    Raises:
        UsageError: for an unknown name, a folder without a model, or a file that is not there.
    """
    described = _describe(model)
    if described is not None:
        content = json.dumps([described.family, described.config, described.sha256], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
    try:
        return digest_of_file(Path(model.rpartition(":")[0]))
    except OSError as error:
        raise UsageError.of(
            f"model {model}", expected="file.py:function", got=error.strerror, fix="check the path"
        ) from None


def _describe(model: str) -> ModelDescription | None:
    """None for a model of a file, which has no description."""
    return None if names_function(model) else describe_model(model)


def cut(run: Run, batches_per_shard: int) -> list[Shard]:
    size = run.batch_size * batches_per_shard
    return [
        Shard(run=run, begin=begin, end=min(begin + size, run.num_samples)) for begin in range(0, run.num_samples, size)
    ]


def _expand(pattern: str) -> list[str]:
    """Registered names that match, or the pattern itself where it names a folder or a file."""
    if names_function(pattern) or is_folder(pattern):
        return [pattern]
    names = MODELS.list(pattern)
    if not names:
        describe_model(pattern)  # says what else it may be
    return names


def _data(suite: SuiteConfig, model: str, described: ModelDescription | None) -> list[str]:
    if suite.data is not None:
        return [suite.data] if isinstance(suite.data, str) else suite.data
    if described is None or not described.card.data:
        raise UsageError.of(f"suite: model {model}", expected="data", got="none in its card", fix="set data")
    return [described.card.data]


def _load(name: str, suite: SuiteConfig) -> Split:
    """The suite's samples of a dataset, or all where there are fewer than its limit."""
    split = load(name, SplitName(suite.split))
    return load(name, SplitName(suite.split), min(suite.limit, len(split)))


def _check_shape(model: str, described: ModelDescription | None, split: Split) -> None:
    """Of a model that has a description; one of a file is looked at once it is built."""
    expected, got = described and described.config.get("input_shape"), list(split.x.shape[1:])
    if expected and list(expected) != got:
        raise UsageError.of(
            f"suite: model {model}",
            expected=f"images {list(expected)}",
            got=f"{got} of {split.name}",
            fix=shape_fix(got, expected) or "drop one",
        )


def _threats(suite: SuiteConfig, model: str, described: ModelDescription | None) -> list[ThreatSpec]:
    if suite.threats is not None:
        return [threat for grid in suite.threats for threat in grid.specs()]
    known = described.card.evaluated_under if described else None
    if known is None:
        raise UsageError.of(f"suite: model {model}", expected="a threat", got="none in its card", fix="set threats")
    return [known]
