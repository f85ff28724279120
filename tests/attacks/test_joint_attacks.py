"""What joint attacks do for states that run away, and settings that would do nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from robustbench_deq.attacks import JointPGD, JointPGDConfig
from robustbench_deq.attacks.joint_pgd import KeepRule
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.models import Linear, LinearConfig
from robustbench_deq.optimise import JIIORule, Mixing, Norm, Schedule
from robustbench_deq.optimise.objectives import Margin
from robustbench_deq.solvers import SOLVERS
from robustbench_deq.threats import Threat

LABELS = torch.tensor([0, 1, 2, 0])


class Switched(Linear):
    """`f(z, u) = c z + u` with c = 0.4, but `factor` for images whose first pixel is above one half."""

    factor = -4.0

    def inject(self, x: Tensor) -> Tensor:
        return torch.cat([torch.where(x.flatten(1)[:, :1] > 0.5, self.factor, 0.4), super().inject(x)], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u[:, :1] * z + u[:, 1:]

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[:, 1:])


@pytest.fixture
def switched(make_images) -> Callable[[float], tuple[Switched, Tensor, Tensor, Tensor]]:
    """`switched(factor)`: model, images, labels, and which images are on the other side of the switch."""

    def make(factor: float) -> tuple[Switched, Tensor, Tensor, Tensor]:
        model = Switched(LinearConfig(input_shape=(1, 4, 4), num_classes=2, hidden=5)).double().eval()
        model.factor = factor
        x = 0.4 + 0.2 * make_images(6)
        is_hard = torch.tensor([False, True, False, True, True, False])
        x[:, 0, 0, 0] = is_hard.double()
        return model, x, torch.tensor([0, 1, 0, 1, 0, 1]), is_hard

    return make


def optimum_of(model: Switched, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The strongest L2 perturbation of the margin, for a first pixel on the limit of the box."""
    factor = torch.where(x[:, 0, 0, 0] > 0.5, model.factor, 0.4)[:, None]
    matrix = (model.readout.weight @ model.injection.weight).detach()
    gradient = ((matrix[1 - y] - matrix[y]) / (1 - factor)).view_as(x)
    points_out = (gradient[:, 0, 0, 0] > 0) == (x[:, 0, 0, 0] > 0.5)
    gradient[:, 0, 0, 0] = torch.where(points_out, 0.0, gradient[:, 0, 0, 0])
    return threat.epsilon * threat.ball(x).direction(gradient)


@pytest.mark.parametrize(
    ("factor", "steps", "rungs"),
    [
        (-1.3, 80, {"num_damped": 3, "num_accelerated": 0, "num_full_solve": 0}),
        (-4.0, 80, {"num_damped": 3, "num_accelerated": 3, "num_full_solve": 0}),
        (-4.0, 3, {"num_damped": 3, "num_accelerated": 3, "num_full_solve": 3}),
    ],
)
def test_states_that_run_away_fall_back_and_are_judged_all_the_same(
    factor: float, steps: int, rungs: dict, switched
) -> None:
    model, x, y, is_hard = switched(factor)
    settings = {"step_size": 1.0, "objective": "margin", "stop_at_success": False}
    threat, config = Threat(Norm.L2, 0.2), JointPGDConfig(steps=steps, **settings)
    result = JointPGD(threat, config)(model, x, y)
    assert {key: result.diagnostics[key] for key in rungs} == rungs
    assert not bool(result.is_failed.any())
    clean, verdict = judge(model, x, y), judge(model, result.x_adv, y)
    assert bool(clean.is_converged.all()) and bool(verdict.is_converged.all())
    best = judge(model, x + optimum_of(model, x, y, threat), y)
    gain = (verdict.loss - clean.loss) / (best.loss - clean.loss)
    assert bool((gain > 0.97).all()), gain
    # The others are what they are alone.
    alone = JointPGD(threat, config)(model, x[~is_hard], y[~is_hard])
    assert alone.diagnostics["num_damped"] == 0
    torch.testing.assert_close(result.x_adv[~is_hard], alone.x_adv, rtol=0, atol=1e-9)


def test_contractive_models_never_fall_back(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    result = JointPGD(Threat(Norm.L2, 0.3), JointPGDConfig(stop_at_success=False))(model, x, LABELS)
    counts = {key: value for key, value in result.diagnostics.items() if key.startswith("num_")}
    assert counts == {"num_damped": 0, "num_accelerated": 0, "num_full_solve": 0}
    assert result.diagnostics["perturbation_steps"] > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"inner_steps": 3}, {"inner_steps": None}, {"inner_steps": None, "accelerator": "anderson"}],
    ids=str,
)
def test_a_state_of_nans_does_not_disturb_the_others(settings: dict, switched) -> None:
    model, x, y, is_lost = switched(torch.nan)
    attack = JointPGD(Threat(Norm.L2, 0.2), JointPGDConfig(steps=20, **settings))
    result, alone = attack(model, x, y), attack(model, x[~is_lost], y[~is_lost])
    torch.testing.assert_close(result.x_adv[~is_lost], alone.x_adv, rtol=0, atol=1e-9)
    assert bool(torch.isfinite(result.x_adv).all())
    verdict = judge(model, result.x_adv, y)
    assert verdict.is_converged.tolist() == (~is_lost).tolist()
    assert not bool(verdict.is_correct[is_lost].any())


def test_published_preset_runs_and_yields_to_other_keys(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    config = JointPGDConfig(preset="jiio-2021", steps=40, stop_at_success=False)
    assert config.steps == 40 and config.keep is KeepRule.JIIO and config.schedule is Schedule.DROP
    assert isinstance(config.rule(), JIIORule)
    source = config.source()
    assert source.accelerator.history_size == 20 and source.mixing is Mixing.ALL
    assert (source.damping_z, source.damping_mu, source.warmup, source.has_loss_start) == (0.8, 0.6, None, False)
    result = JointPGD(Threat(Norm.L2, 0.5), config)(model, x, LABELS)
    clean, verdict = judge(model, x, LABELS), judge(model, result.x_adv, LABELS)
    assert bool((verdict.loss > clean.loss).all())


@pytest.mark.parametrize("mixing", ["state", "all"])
@pytest.mark.parametrize("inner_steps", [2, None])
@pytest.mark.parametrize("accelerator", [name for name in SOLVERS if not SOLVERS.get(name)().needs_jvp])
def test_every_solver_without_jvps_accelerates(
    accelerator: str, inner_steps: int | None, mixing: str, make_model, make_images
) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    mixed = {"accelerator": accelerator, "inner_steps": inner_steps, "mixing": mixing}
    config, reference = (JointPGDConfig(steps=40, stop_at_success=False, **more) for more in (mixed, {}))
    result = JointPGD(Threat(Norm.L2, 0.3), config)(model, x, LABELS)
    plain = JointPGD(Threat(Norm.L2, 0.3), reference)(model, x, LABELS)
    assert not bool(result.is_failed.any())
    losses = [judge(model, found.x_adv, LABELS).loss for found in (result, plain)]
    clean = judge(model, x, LABELS).loss
    assert bool((losses[0] > clean).all())
    torch.testing.assert_close(losses[0], losses[1], rtol=0.2, atol=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 4, "inner_steps": 5}, r"inner_steps of at most steps \(4\): the perturbation never moves"),
        ({"accelerator": "anderson"}, "inner_steps above 1 or null, or mixing=all, with an accelerator"),
        ({"max_lag": 2.0}, "no max_lag with inner_steps, which is fixed, which does not use it"),
        ({"max_inner_steps": 3}, "no max_inner_steps with inner_steps"),
        ({"history_size": 3}, "no history_size with accelerator=None"),
        ({"history_size": 3, "accelerator": "picard", "inner_steps": 2}, "no history_size with accelerator=picard"),
        ({"mixing": "all"}, "no mixing with accelerator, which is null"),
        ({"keep": "last", "keep_residual": 0.1}, "no keep_residual with keep=last"),
        ({"warmup_steps": 0, "warmup_tolerance": 0.1}, "no warmup_tolerance with warmup_steps=0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JointPGDConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"preset": "jiio-2021"},
        {"preset": "jiio-2021", "accelerator": None},
        {"inner_steps": None, "max_lag": 2.0},
    ],
)
def test_resolved_settings_are_accepted_again(values: dict) -> None:
    config = JointPGDConfig(**values)
    assert JointPGDConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize("keep", ["last", "jiio", "loss"])
def test_a_lost_state_has_no_say_in_what_the_ladder_returns(keep: str, switched) -> None:
    """Far from its equilibrium a state can show any loss; the rung that finds the equilibrium must win."""
    model, x, y, is_hard = switched(-4.0)
    threat = Threat(Norm.L2, 0.2)
    config = JointPGDConfig(steps=80, step_size=1.0, objective="margin", keep=keep, stop_at_success=False)
    result = JointPGD(threat, config)(model, x, y)
    assert result.diagnostics["num_accelerated"] == 3
    clean, verdict = judge(model, x, y), judge(model, result.x_adv, y)
    best = judge(model, x + optimum_of(model, x, y, threat), y)
    gain = (verdict.loss - clean.loss) / (best.loss - clean.loss)
    assert bool((gain[is_hard] > 0.9).all()), gain
    torch.testing.assert_close(result.loss[is_hard], margin_of(model, result.x_adv, y)[is_hard], rtol=0.05, atol=0.05)


def margin_of(model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return Margin(y)(model(x))
