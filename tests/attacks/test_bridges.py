"""Attacks of other libraries by name: which there are, what each gets, and that nothing outside moves."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor

from robustbench_deq.attacks import ATTACKS, build_attack
from robustbench_deq.attacks.bridge import BridgedAttack
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat

FEW = {
    **dict.fromkeys(
        ("steps", "n_iter", "iter", "df_steps", "num_iter_set", "max_gradient_eval_steps", "directions"), 3
    ),
    **dict.fromkeys(("binary_search_steps", "initial_gradient_eval_steps", "repeats", "directions"), 2),
    **{
        "n_queries": 20,
        "max_iterations": 20,
        "nb_sample": 8,
        "num_steps": 5,
        "largest_const": 1e-4,
        "decrease_factor": 0.3,
    },
}
"""Less work than by default, for what has such a setting."""
NAMES = [f"{prefix}:{name}" for prefix, names in ATTACKS.prefixed().items() for name in names]
OF_COLOURS = {f"torchattacks:{name}" for name in ("PIFGSM", "PIFGSMPP", "TIFGSM")}
AIMED_ONLY = {"foolbox:GenAttack"}
SHAPE = (1, 8, 8)
RADIUS = {"l1": 1.0, "l2": 0.5, "linf": 0.1}


def few(name: str, norm: str | None = None, **settings: Any) -> BridgedAttack:
    kind = ATTACKS.get(name)
    norm = norm or kind.foreign.norms[0]
    known = {key: value for key, value in FEW.items() if key in kind.foreign.settings}
    return kind(Threat(norm, RADIUS[norm]), settings=known | settings)


@pytest.fixture(scope="module")
def case(make_model, make_images) -> tuple[EquilibriumModel, Tensor, Tensor]:
    """Five classes and single precision, which some of the libraries take for granted."""
    model, x = (
        make_model("deq-fc", torch.float32, rtol=1e-5, num_classes=5, input_shape=SHAPE),
        make_images(3, torch.float32, shape=SHAPE),
    )
    with torch.no_grad():
        model.readout.bias.sub_(model(x).mean(0))
        return model, x, model(x).argmax(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_COLOURS])
def test_every_attack_of_a_library_runs_metered_seeded_and_within_the_ball(name: str, case) -> None:
    model, x, y = case
    attack = few(name)
    norm = attack.threat.norm
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    targets = (y + 1) % 5 if name in AIMED_ONLY else None
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    result = attack(model, x, y, targets=targets, seed=5)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items()) and model.meter is None
    assert float(norm.size(result.delta).max()) <= RADIUS[norm.name] * (1 + 1e-5)
    assert float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1 and result.x_adv.dtype == x.dtype
    assert result.cost.cell_evals > 0 and (result.cost.cell_vjps > 0) == attack.is_gradient_based
    assert not bool(result.is_failed.any())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(attack(model, x, y, targets=targets, seed=5).x_adv, result.x_adv)


@pytest.mark.parametrize(("name", "norm"), [
    (name, norm) for name in NAMES for norm in ATTACKS.get(name).foreign.norms[1:] if name.startswith(("torch", "adv"))
])  # fmt: skip
def test_all_norms_that_are_named_can_be_had(name: str, norm: str, case) -> None:
    model, x, y = case
    result = few(name, norm)(model, x, y)
    assert 0 < float(Norm.parse(norm).size(result.delta).max()) <= RADIUS[norm] * (1 + 1e-5)


def test_the_threat_and_the_model_say_radius_norm_classes_and_seed(case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case
    seen: dict[str, Any] = {}
    init = torchattacks.APGDT.__init__
    monkeypatch.setattr(
        torchattacks.APGDT, "forward", lambda self, images, labels: seen.update(vars(self)) or images.clone()
    )
    assert torchattacks.APGDT.__init__ is init
    build_attack("torchattacks:APGDT", Threat("l2", 0.25), {"settings": {"steps": 7}})(model, x, y, seed=9)
    assert (seen["eps"], seen["norm"], seen["steps"], seen["seed"]) == (0.25, "L2", 7, 9)
    assert seen["target_class"] is None or seen["n_target_classes"] == 4
    monkeypatch.setattr(
        torchattacks.PGD, "forward", lambda self, images, labels: seen.update(vars(self)) or images.clone()
    )
    build_attack("torchattacks:PGD", Threat("linf", 0.4), {})(model, x, y)
    assert (seen["eps"], seen["alpha"]) == (0.4, pytest.approx(0.1))  # the default step is a quarter of the radius
    build_attack("torchattacks:PGD", Threat("linf", 0.4), {"settings": {"alpha": 0.3}})(model, x, y)
    assert seen["alpha"] == 0.3


def test_the_named_one_is_the_same_attack(make_model, make_images) -> None:
    model, x, y = make_model("deq-fc"), make_images(5), torch.tensor([0, 1, 2, 1, 0])
    threat, short = Threat("linf", 0.06), {"steps": 6, "random_start": False}
    by_name = build_attack("torchattacks:PGD", threat, {"settings": short})(model, x, y)
    named = build_attack("torchattacks-pgd", threat, {"steps": 6})(model, x, y)
    torch.testing.assert_close(by_name.x_adv, named.x_adv, rtol=0, atol=1e-12)
    assert by_name.cost.cell_evals == named.cost.cell_evals > 0


def test_the_black_box_needs_no_gradient(case) -> None:
    model, x, y = case
    head = model.head
    model.head = lambda z: head(z.detach())
    try:
        result = few("torchattacks:Square", "l2")(model, x, y)
        assert result.cost.cell_vjps == 0 and bool(result.delta.any())
        with pytest.raises(UsageError, match="expected a gradient"):
            few("torchattacks:APGD")(model, x, y)
    finally:
        del model.head


def test_targets_are_handed_on(case) -> None:
    model, x, y = case
    targets = (y + 2) % 5
    attack = ATTACKS.get("torchattacks:PGDL2")(Threat("l2", 2.0), settings={"steps": 20, "random_start": False})
    with torch.no_grad():
        gained = model(attack(model, x, y, targets=targets).x_adv) - model(x)
    assert bool((gained.argmax(1) == targets).all())
    with pytest.raises(UsageError, match="torchattacks:APGD: expected an untargeted run, got targets"):
        few("torchattacks:APGD")(model, x, y, targets=targets)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchattacks:CV", "closest CW, got none that torchattacks has"),
        ("torchattacks:OnePixel", "got one that counts pixels, which has no ball here"),
        ("torchattacks:MultiAttack", "got one that takes attacks in place of a model"),
        ("torchattacks:LGV", "got one that trains models on data"),
        ("torchattacks:", "unknown attack"),
        ("torchattack:PGD", "unknown attack"),
    ],
)
def test_names_that_cannot_run_are_refused_with_the_reason(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        ATTACKS.get(name)
    assert "\n" not in str(caught.value)


def test_norms_settings_and_images_that_do_not_fit_are_refused(case) -> None:
    model, x, y = case
    with pytest.raises(UsageError, match="torchattacks:CW: expected norm l2, got linf; pass --norm l2"):
        build_attack("torchattacks:CW", Threat("linf", 0.1), {})
    for key in ("stepz", "eps", "norm", "model"):
        with pytest.raises(UsageError, match=rf"torchattacks:APGD: settings: expected .*, got '{key}'"):
            build_attack("torchattacks:APGD", Threat("l2", 0.1), {"settings": {key: 1}})
    with pytest.raises(UsageError, match="restarts"):
        build_attack("torchattacks:APGD", Threat("l2", 0.1), {"restarts": 2})
    with pytest.raises(UsageError, match="torchattacks:TIFGSM: expected images of three colours, got 1"):
        build_attack("torchattacks:TIFGSM", Threat("linf", 0.1), {})(model, x, y)
    with pytest.raises(RunError, match=r"^attack torchattacks:APGD: TypeError: .*, in .* line \d+$"):
        build_attack("torchattacks:APGD", Threat("l2", 0.1), {"settings": {"steps": "many"}})(model, x, y)
    assert model.meter is None and not model.training


def test_a_library_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench_deq.attacks import foolbox_bridge

    monkeypatch.setitem(__import__("sys").modules, "foolbox", None)
    foolbox_bridge._members.cache_clear()
    foolbox_bridge._named.cache_clear()
    assert ATTACKS.prefixed()["foolbox"] == []
    with pytest.raises(UsageError, match=r"expected the package foolbox, got none; pip install '.*\[peers\]'"):
        ATTACKS.get("foolbox:LinfPGD")
