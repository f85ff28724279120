"""The contract of every registered model, on its own weights: digits, resized to its shape, in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.attacks import JointPGD, JointPGDConfig
from robustbench_deq.data import SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.meter import Meter
from robustbench_deq.models import MODELS, describe_model, load_folder, load_model, save_model
from robustbench_deq.optimise import Norm
from robustbench_deq.solvers import Anderson, Solve, Status
from robustbench_deq.threats import Threat

every_model = pytest.mark.parametrize("name", list(MODELS))
TIGHT = Solve(Anderson(history_size=10, ridge=1e-12), rtol=1e-11, max_steps=1000)


def images_for(model: EquilibriumModel, count: int) -> tuple[Tensor, Tensor]:
    digits = load("digits", SplitName.TEST, count)
    x = F.interpolate(digits.x, size=model.input_shape[1:], mode="bilinear").clamp(0, 1)
    return x.expand(-1, model.input_shape[0], -1, -1).contiguous(), digits.y


def tight(name: str) -> EquilibriumModel:
    model = load_model(name).double()
    model.solve, model.adjoint = TIGHT, Implicit(TIGHT)
    return model


@every_model
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradient_is_the_slope(name: str, mode: str) -> None:
    model = tight(name).train(mode == "train")
    x = images_for(model, 2)[0].double()
    weights = torch.linspace(-1, 1, model.num_classes, dtype=x.dtype)

    def value(images: Tensor) -> Tensor:
        return model(images) @ weights

    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(value(leaf).sum(), leaf)[0]
    direction = gradient + gradient.norm() * F.normalize(
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)), dim=(1, 2, 3)
    )
    direction = direction / direction.abs().max()
    step = 1e-8  # longer ones cross kinks of relu
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-5, atol=1e-6)


@every_model
def test_a_sample_sees_neither_its_batch_nor_its_place(name: str) -> None:
    model = tight(name)
    x = images_for(model, 5)[0].double()
    with torch.no_grad():
        whole = model(x)
        order = torch.tensor([4, 0, 3, 1, 2])
        torch.testing.assert_close(model(x[order]), whole[order], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(model(x[2:3]), whole[2:3], rtol=1e-7, atol=1e-8)


@every_model
def test_statuses_and_steps_are_per_sample(name: str) -> None:
    model = load_model(name)
    x = images_for(model, 3)[0]
    with torch.no_grad():
        found = model.equilibrium(x)
        assert found.status.shape == found.num_steps.shape == found.residual.shape == (3,)
        assert bool(found.is_converged.all())
        start = model.initial_state(model.inject(x))
        start[1] = found.value[1]
        mixed = model.equilibrium(x, start, solve=model.solve.with_(max_steps=1))
        assert mixed.status.tolist() == [Status.MAX_STEPS, Status.CONVERGED, Status.MAX_STEPS]
        nothing = x.clone()
        nothing[2] = torch.nan
        broken = model.equilibrium(nothing)
    assert int(broken.status[2]) == Status.NONFINITE
    assert bool(broken.is_converged[:2].all())
    torch.testing.assert_close(broken.value[:2], found.value[:2], rtol=1e-2, atol=1e-2)


@every_model
def test_card_says_what_the_weights_guarantee(name: str) -> None:
    """The margin rounded down and the bound rounded up, to four digits."""
    found, card = load_model(name).certificates(), describe_model(name).card
    assert {"monotonicity", "lipschitz"} - found.keys() == {
        key for key in ("monotonicity", "lipschitz") if getattr(card, key) is None
    }
    for key, value in found.items():
        excess = (value - card.monotonicity) if key == "monotonicity" else (card.lipschitz - value)
        assert -1e-5 <= excess <= 1.1e-4


@pytest.mark.parametrize("name", MODELS.list("lben.*"))
def test_gain_of_shipped_lipschitz_models_is_below_their_bound(name: str, logit_gain) -> None:
    model = tight(name)
    gain = logit_gain(model, images_for(model, 6)[0].double())
    assert 0.01 * model.config.lipschitz < gain <= model.config.lipschitz


@every_model
def test_saved_and_loaded_it_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = load_model(name)
    x = images_for(model, 3)[0]
    save_model(model, tmp_path, "copy")
    copy = load_folder(tmp_path)
    state = copy.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(copy(x), model(x))


@every_model
def test_meter_counts_every_row(name: str) -> None:
    model, forwards, backwards = load_model(name), [], []
    x = images_for(model, 4)[0].requires_grad_()
    cell = model.cell

    def watched(z: Tensor, u: Tensor) -> Tensor:
        output = cell(z, u)
        forwards.append(len(output))
        if output.requires_grad:
            output.register_hook(lambda gradient: backwards.append(len(gradient)))
        return output

    model.cell = watched
    with Meter(model) as meter:
        model(x).sum().backward()
    cost = meter.cost(4)
    assert cost.cell_evals == sum(forwards) / 4 > 1
    assert cost.cell_vjps == sum(backwards) / 4 >= 1


@every_model
def test_bad_input_is_refused(name: str) -> None:
    model = load_model(name)
    good = images_for(model, 2)[0]
    for bad in (good[:, :, :-1], good * 255, good - 1, torch.full_like(good, torch.nan), good[:0], good.byte()):
        with pytest.raises(UsageError, match="expected"):
            model.check_images(bad)
    model.check_images(good)


@every_model
def test_default_joint_attack_fails_on_no_sample(name: str) -> None:
    model, card = load_model(name), describe_model(name).card
    x, y = images_for(model, 16)
    spec = card.evaluation or {"norm": "l2", "epsilon": 0.5}
    attack = JointPGD(Threat(Norm.parse(spec["norm"]), spec["epsilon"]), JointPGDConfig(stop_at_success=False))
    result = attack(model, x, y)
    assert not bool(result.is_failed.any())
    verdict = judge(model, result.x_adv, y)
    assert bool(verdict.is_converged.all())
    assert float(verdict.loss.mean()) > float(judge(model, x, y).loss.mean())
