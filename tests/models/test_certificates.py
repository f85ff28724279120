"""Certified radii: no image within one changes the class, they are what the formula says, and not much too small."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.attacks import JointPGD
from robustbench_deq.certificates import certified
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.evaluate.judge import JUDGE_RTOL
from robustbench_deq.models import load_model
from robustbench_deq.models.defences import EarlyState, EntropyReduction
from robustbench_deq.models.monotone_bounds import TOLERANCE
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat

FAMILIES = ["mondeq-fc", "mondeq-conv", "mondeq-multi", "lben"]
every_family = pytest.mark.parametrize("family", FAMILIES)
both_splittings = pytest.mark.parametrize("splitting", ["forward-backward", "peaceman-rachford"])


def settled(model: EquilibriumModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Equilibria of images, and the classes that they are taken for."""
    with torch.no_grad():
        z = model.equilibrium(x).value
        return z, model.head(z).argmax(1)


def climbed(model: EquilibriumModel, x: Tensor, y: Tensor, radii: Tensor, num_steps: int = 8) -> Tensor:
    """The smallest margin of `y` that plain ascent in L2 balls of `radii` meets on its way, and at random points."""
    random = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    delta, worst = radii.view(-1, 1, 1, 1) * F.normalize(random, dim=(1, 2, 3)), torch.full((len(x),), torch.inf)
    for _ in range(num_steps):
        leaf = (x + delta).requires_grad_()
        logits = model(leaf)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        margin = logits.gather(1, y[:, None])[:, 0] - others
        worst = torch.minimum(worst, margin.detach())
        step = F.normalize(-torch.autograd.grad(margin.sum(), leaf)[0], dim=(1, 2, 3))
        delta = radii.view(-1, 1, 1, 1) * F.normalize(delta + 0.5 * radii.view(-1, 1, 1, 1) * step, dim=(1, 2, 3))
    return worst


@every_family
@both_splittings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_image_within_its_radius_changes_the_class(family, splitting, dtype, make_model, make_images) -> None:
    rtol = 1e-5 if dtype is torch.float32 else 1e-12
    model = make_model(family, dtype=dtype, rtol=rtol, splitting=splitting, splitting_step=0.2, pixel_std=0.3)
    x = make_images(8, dtype)
    z, y = settled(model, x)
    radii = model.certified_radii(z, y)
    assert radii.dtype is torch.float64 and bool((radii > 0).all())
    assert bool((climbed(model, x, y, radii.to(dtype)) > 0).all())


def linear_case(make_model, dtype: torch.dtype = torch.float64) -> EquilibriumModel:
    """W = 0, all of the state at work, and U with orthonormal rows: the margin is a linear function of the image."""
    model = make_model("mondeq-fc", dtype=dtype)
    with torch.no_grad():
        model.a.zero_(), model.b.zero_()
        model.injection.weight.copy_(torch.eye(6, 16))
        model.injection.bias.fill_(5.0)
    return model


def test_radius_is_the_distance_to_the_boundary_where_the_network_is_linear(make_model, make_images) -> None:
    model, x = linear_case(make_model), make_images(6)
    z, y = settled(model, x)
    radii = model.certified_radii(z, y)
    w, logits = model.readout.weight.detach(), model.head(z).detach()
    ratios = (logits.gather(1, y[:, None]) - logits) / torch.cdist(w, w)[y]
    nearest = ratios.scatter(1, y[:, None], torch.inf).min(1)
    assert bool((radii <= nearest.values).all())
    torch.testing.assert_close(radii, nearest.values, rtol=0.02, atol=0)
    direction = F.normalize((w[nearest.indices] - w[y]) @ model.injection.weight.detach(), dim=1).view_as(x)
    for factor, is_kept in ((1.0, True), (1.05, False)):
        _, moved = settled(model, x + factor * radii.view(-1, 1, 1, 1) * direction)
        assert bool(((moved == y) == is_kept).all())


@every_family
@pytest.mark.parametrize("pixel_std", [1.0, 0.25])
def test_gain_lies_between_the_networks_own_and_the_product_of_norms(
    family, pixel_std, make_model, make_images
) -> None:
    model, x = make_model(family, pixel_std=pixel_std), make_images(4)
    gain, w = model._measure_bounds().gain, model.readout.weight.detach()
    injection = torch.linalg.matrix_norm(model._columns().detach().flatten(1), ord=2)
    product = torch.cdist(w, w) * injection / model.monotonicity()
    assert bool((gain <= product * (1 + 1e-9)).all())
    if family == "lben":
        assert float(gain.max()) <= math.sqrt(2) * model.config.lipschitz
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    for one, other in ((0, 1), (2, 0)):
        slope = torch.autograd.grad((logits[:, one] - logits[:, other]).sum(), leaf, retain_graph=True)[0]
        own = float(torch.linalg.vector_norm(slope.flatten(1), dim=1).max())
        assert 0.05 * float(gain[one, other]) < own <= float(gain[one, other])


@every_family
@both_splittings
def test_error_of_a_state_is_within_its_residuals_bound(family, splitting, make_model, make_images) -> None:
    model, x = make_model(family, splitting=splitting, splitting_step=0.2), make_images(5)
    z, _ = settled(model, x)
    with torch.no_grad():
        off = z + 0.1 * torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2))
        residual = (model.cell(off, model.inject(x)) - off).flatten(1).norm(dim=1)
        error = (off.relu() - z.relu()).flatten(1).norm(dim=1)
        assert bool((error <= residual * model._measure_bounds().error / TOLERANCE).all())
    assert JUDGE_RTOL < TOLERANCE


def test_radius_follows_margin_and_scale(make_model, make_images) -> None:
    model, x = make_model("mondeq-fc"), make_images(6)
    z, y = settled(model, x)
    before = model.certified_radii(z, y)
    with torch.no_grad():
        model.readout.weight.mul_(2), model.readout.bias.mul_(2)  # sees that the weights have changed
        torch.testing.assert_close(model.certified_radii(z, y), before)
        model.readout.bias.add_(F.one_hot(y[0], 3))
        assert float(model.certified_radii(z[:1], y[:1])) > float(before[0])
    other = make_model("mondeq-fc", pixel_std=0.5)  # the same weights
    torch.testing.assert_close(other._measure_bounds().gain, 2 * make_model("mondeq-fc")._measure_bounds().gain)


def test_nothing_is_certified_for_another_class_or_without_a_state(make_model, make_images) -> None:
    model = make_model("lben")
    z, y = settled(model, make_images(3))
    assert model.certified_radii(z, (y + 1) % 3).tolist() == [0.0] * 3
    z[1] = torch.nan
    assert (model.certified_radii(z, y) > 0).tolist() == [True, False, True]


def test_bounds_are_measured_once_for_the_weights_as_they_are(make_model, make_images, monkeypatch) -> None:
    model = make_model("mondeq-fc")
    measured: list[int] = []
    build = model._measure_bounds
    monkeypatch.setattr(model, "_measure_bounds", lambda: measured.append(1) or build())
    z, y = settled(model, make_images(3))
    with torch.inference_mode():
        first = model.certified_radii(z, y)
    assert torch.equal(model.certified_radii(z, y), first) and len(measured) == 1
    with torch.no_grad():
        model.injection.weight.mul_(1.5)
    assert bool((model.certified_radii(z, y) < first).all()) and len(measured) == 2


@pytest.mark.parametrize(("norm", "reach"), [(Norm.L1, 1.0), (Norm.L2, 1.0), (Norm.LINF, 4.0)])
def test_threats_of_every_norm_are_put_into_a_ball_of_l2(norm, reach, make_model, make_images) -> None:
    model = make_model("mondeq-fc")  # images of 16 pixels
    z, y = settled(model, make_images(8))
    radii = model.certified_radii(z, y)
    middle = float(radii.quantile(0.4))
    found = certified(model, Threat(norm, middle / reach), z, y)
    assert found.tolist() == (radii > middle * (1 + 1e-5) + 1e-5 * reach).tolist() and 0 < int(found.sum()) < 8
    corner = torch.full((1, 16), 1.0, dtype=torch.float64) if norm is Norm.LINF else torch.eye(16, dtype=torch.float64)
    assert float(corner.norm(dim=1).max()) == pytest.approx(norm.l2_reach(16) * float(norm.size(corner).max()))


def test_models_and_norms_without_a_certificate_say_so(make_model, make_images, monkeypatch) -> None:
    x = make_images(3)
    for model in (make_model("deq-fc"), EarlyState(make_model("lben"), 3), EntropyReduction(make_model("mondeq-fc"))):
        assert certified(model, Threat("l2", 1e-6), *settled(model, x)) is None
    model = make_model("lben")
    monkeypatch.setattr(type(Norm.L1), "l2_reach", lambda self, count: None)
    assert certified(model, Threat("l1", 1e-6), *settled(model, x)) is None


@every_family
def test_a_subclass_which_may_compute_something_else_has_no_certificate(family, make_model, make_images) -> None:
    model, x = make_model(family), make_images(4)

    class Louder(type(model)):  # type: ignore[misc]  # lben's operator makes its bound true for its own injection alone
        def inject(self, x: Tensor) -> Tensor:
            return super().inject(20 * x)

    model.__class__ = Louder
    assert certified(model, Threat("l2", 1e-6), *settled(model, x)) is None


@pytest.mark.parametrize(
    "name", ["mondeq-fc.digits-joint-l2", "lben.fashion-joint-l2", "mondeq-multi.fashion-joint-l2"]
)
def test_no_attack_breaks_what_is_certified_of_a_shipped_model(name: str) -> None:
    model, digits = load_model(name), load("digits", limit=16)
    x = F.interpolate(digits.x, size=model.input_shape[1:], mode="bilinear").clamp(0, 1)
    y = model(x).argmax(1)  # which the models of fashion take for clothes
    radii = model.certified_radii(judge_clean(model, x, y).z, y)
    threat = Threat("l2", float(radii.median()))
    is_certified = certified(model, threat, judge_clean(model, x, y).z, y)
    found = evaluate(model, JointPGD(threat, steps=8), Split("mine", SplitName.TEST, x, y, torch.arange(16), "ab"))
    assert 4 < int(is_certified.sum()) < 12
    assert bool(found.samples["is_robust"][is_certified.numpy()].all())
    assert float(found.record.max_perturbation) > 0.9 * threat.epsilon
