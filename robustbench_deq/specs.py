"""An attack, a solve and an adjoint as configs, suites and `--set` name them.

Each spec holds plain values under the keys that users write, and `build` makes the object, as does that of a threat
(`threat_spec`):

    AttackSpec   name, threat, config     -> Attack, from the registry `ATTACKS`
    SolveSpec    solver, tolerance, ...   -> Solve
    AdjointSpec  name, solve, ...         -> Adjoint

A family's config, a training config or a suite nests these, and adds nothing to them but other defaults or lists.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field, JsonValue, model_validator

from robustbench_deq.adjoints import ADJOINTS, DEFAULT_ADJOINT_SOLVE, Adjoint
from robustbench_deq.configs import Config, named_in
from robustbench_deq.protocol import Attack, make_attack
from robustbench_deq.solvers import SOLVERS, Solve, Solver
from robustbench_deq.threat_spec import ThreatSpec


class AttackSpec(Config):
    """An attack by name, with its threat and its own settings."""

    name: str = Field("joint-pgd", description="a registered attack")
    threat: ThreatSpec = Field(ThreatSpec(), description="norm and radius")
    config: dict[str, Any] = Field(default_factory=dict, description="the attack's own settings")

    def build(self, where: str | None = None) -> Attack[Any]:
        """The attack. Importing `robustbench_deq.attacks` registers those that come with the package.

        Args:
            where: what the settings are from, for the message.

        Raises:
            UsageError: for an unknown name, or settings or a threat that the attack refuses.
        """
        return make_attack(self.name, self.threat.build(), self.config, where)


def _settings_of(solver: Solver) -> dict[str, Any]:
    """The settings of a solver with their defaults; one that is not a dataclass has none."""
    if not dataclasses.is_dataclass(solver):
        return {}
    names = (field.name for field in dataclasses.fields(solver))
    return {name: getattr(solver, name) for name in names if name != "kind"}  # Anderson's: the solver's name says it


class SolveSpec(Config):
    """A solver by name, its own settings, and when it stops."""

    solver: Annotated[str, named_in(SOLVERS)] = Field("anderson", description="a registered solver")
    tolerance: float = Field(1e-4, gt=0, description="relative residual at which a sample is done")
    max_steps: int = Field(100, ge=1, description="most steps of a solve")
    settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="the solver's own: history_size, damping, ridge, ..."
    )

    @model_validator(mode="after")
    def _check_settings(self) -> SolveSpec:
        defaults = _settings_of(SOLVERS.get(self.solver)())
        for name, value in self.settings.items():
            if name not in defaults:
                raise ValueError(f"settings of {self.solver} among {', '.join(defaults) or 'none'}, and no {name!r}")
            is_count = isinstance(defaults[name], int)
            number, least = ("an integer >= 1", 1) if is_count else ("a number >= 0", 0)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or (is_count and not isinstance(value, int))
                or value < least
            ):
                raise ValueError(f"{number} as the setting {name}, and not {value!r}")
        return self

    def build(self) -> Solve:
        solver = SOLVERS.get(self.solver)()
        if self.settings and dataclasses.is_dataclass(solver):
            solver = dataclasses.replace(solver, **self.settings)
        return Solve(solver, rtol=self.tolerance, max_steps=self.max_steps)


class AdjointSpec(Config):
    """An adjoint by name. A setting that its kind does not use is refused."""

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
