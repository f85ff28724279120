"""Training on a few digits: it learns, it resumes to the bit, and it refuses what it cannot trust."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.attacks import JointPGD, JointPGDConfig, SequentialPGD, SequentialPGDConfig
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.models import DEQFC, DEQFCConfig
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import Attack, Batch, Proposal, Recorder
from robustbench_deq.solvers import Anderson, Solve
from robustbench_deq.threats import Threat
from robustbench_deq.training import checkpoint as checkpoint_module
from robustbench_deq.training import loop
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loop import Trainer, random_flip, random_shift
from robustbench_deq.training.loss import batch_loss, jacobian_norm

TIGHT = Solve(Anderson(), rtol=1e-6, max_steps=100)


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    return load("digits", SplitName.TRAIN, 96), load("digits", SplitName.VALIDATION, 40)


def small_model(seed: int = 0) -> DEQFC:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DEQFC(DEQFCConfig(input_shape=(1, 8, 8), num_classes=10, hidden=16))


def small_config(**changes: object) -> TrainingConfig:
    values = {
        "name": "tiny",
        "model": {"family": "deq-fc"},
        "epochs": 3,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "random_shift": 1,
        "jacobian_weight": 0.1,
        "jacobian_frequency": 0.5,
        **changes,
    }
    return TrainingConfig.model_validate(values)


def joint_pgd() -> JointPGD:
    config = JointPGDConfig(steps=4, warmup_steps=2, random_start=True)
    return JointPGD(Threat(Norm.L2, 0.5), config)


def pgd() -> SequentialPGD:
    config = SequentialPGDConfig(steps=3, tolerance=1e-2, random_start=True)
    return SequentialPGD(Threat(Norm.L2, 0.5), config)


@pytest.fixture
def make_trainer(digits) -> Callable[..., Trainer]:
    def make(
        folder: Path | None = None, attack: Attack | None = None, seed: int = 0, model=None, **changes: object
    ) -> Trainer:
        model = small_model(seed) if model is None else model
        return Trainer(small_config(**changes), model, *digits, attack, None, folder)

    return make


def interrupt_at(epoch: int, batch: int) -> Callable[[int, int, int, float], None]:
    def progress(now: int, done: int, total: int, loss: float) -> None:
        if (now, done) == (epoch, batch):
            raise KeyboardInterrupt

    return progress


# Runs


def test_training_lowers_the_loss_and_returns_the_averaged_weights(make_trainer) -> None:
    trainer = make_trainer(epochs=6, ema_decay=0.8, random_shift=0)
    seen = []
    model = trainer.run(lambda *args: seen.append(args))
    losses = [row.train_loss for row in trainer.history]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.history[-1].clean_accuracy > 0.4  # chance is 0.1
    assert [row.num_unconverged for row in trainer.history] == [0] * 6
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, trainer.average[name])
    assert [(epoch, done, total) for epoch, done, total, _ in seen] == [(e, b, 3) for e in range(6) for b in (1, 2, 3)]


def test_averaging_off_returns_the_last_weights(make_trainer, monkeypatch) -> None:
    trainer = make_trainer(epochs=1, ema_decay=0.0)
    last, validate = {}, trainer._validate

    def look() -> tuple[float, float | None, int]:
        last.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return validate()

    monkeypatch.setattr(trainer, "_validate", look)
    for name, value in trainer.run().state_dict().items():
        assert torch.equal(value, last[name])


def test_validation_leaves_the_weights_in_training_as_they_were(make_trainer) -> None:
    trainer = make_trainer(ema_decay=0.9)
    trainer._epoch(0, None)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert any(not torch.equal(before[name], trainer.average[name]) for name in before)
    trainer._validate()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_learning_rate_warms_up_and_falls_to_zero(make_trainer) -> None:
    trainer = make_trainer(epochs=10, warmup_fraction=0.2)
    factors = []
    for step in range(30):
        trainer.step = step
        factors.append(trainer._learning_rate_factor())
    assert factors[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert factors[6] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[6:]))
    assert factors[-1] < 0.02


def test_the_radius_of_the_adversary_grows_over_the_warmup(make_trainer) -> None:
    trainer = make_trainer(attack=joint_pgd(), attack_warmup_epochs=2.0)
    radii = []
    for step in range(8):
        trainer.step = step
        radii.append(trainer._adversary().threat.epsilon)
    assert radii == pytest.approx([0.5 * (step + 1) / 6 for step in range(6)] + [0.5, 0.5])
    assert trainer._adversary() is trainer.attack


@pytest.mark.parametrize("adversary", [joint_pgd, pgd])
def test_adversarial_training_reports_a_robust_accuracy_below_the_clean_one(adversary, digits) -> None:
    trainer = Trainer(small_config(epochs=4), small_model(), *digits, adversary(), joint_pgd())
    trainer.run()
    for row in trainer.history:
        assert 0.0 <= row.robust_accuracy <= row.clean_accuracy
    assert trainer.history[-1].train_loss < trainer.history[0].train_loss


def test_failed_samples_are_not_robust_in_validation(digits) -> None:
    class Lost(JointPGD):
        def run(self, model, batch, record) -> Proposal:
            proposal = super().run(model, batch, record)
            return dataclasses.replace(proposal, delta=torch.full_like(batch.images, torch.nan))

    trainer = Trainer(small_config(), small_model(), *digits, None, Lost(Threat(Norm.L2, 0.5)))
    clean, robust, _ = trainer._validate()
    assert clean > 0 and robust == 0


def test_averages_of_whole_numbers_are_the_last_ones(digits) -> None:
    model = small_model()
    model.register_buffer("count", torch.tensor(0))
    trainer = Trainer(small_config(), model, *digits, None, None)
    model.count.add_(7)
    trainer._update_average()
    assert int(trainer.average["count"]) == 7


# Resuming


@pytest.mark.parametrize("attack", [None, joint_pgd, pgd], ids=["standard", "joint-pgd", "pgd"])
@pytest.mark.parametrize("batch", [1, 3])
def test_resumed_run_ends_bit_identical_to_the_undisturbed_one(make_trainer, attack, batch: int, tmp_path) -> None:
    attack = attack and attack()
    whole = make_trainer(tmp_path / "whole", attack)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", attack).run(interrupt_at(1, batch))
    again = make_trainer(tmp_path / "cut", attack, seed=7)  # whatever it was built from, the checkpoint decides
    assert again.resume() == 1
    torch.manual_seed(99)  # the global generator plays no part
    again.run()
    assert again.step == whole.step == 9
    for name, value in whole.average.items():
        assert torch.equal(again.average[name], value), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    for one, other in zip(whole.history, again.history, strict=True):
        free = {"train_seconds": 0.0, "total_seconds": 0.0}
        assert dataclasses.replace(one, **free) == dataclasses.replace(other, **free)


def test_resuming_a_finished_run_trains_no_further(make_trainer, tmp_path) -> None:
    done = make_trainer(tmp_path)
    done.run()
    again = make_trainer(tmp_path, seed=7)
    assert again.resume() == 3
    again.run(interrupt_at(3, 1))
    for name, value in done.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_total_seconds_go_on_counting_after_a_resume(make_trainer, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path).run(interrupt_at(2, 1))
    again = make_trainer(tmp_path)
    again.resume()
    before = again.history[-1].total_seconds
    again.run()
    assert again.history[-1].total_seconds > before


# Checkpoints


def checkpoint_tensors(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.999])
def test_flipped_byte_in_the_tensors_is_refused(make_trainer, share: float, tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    path = checkpoint_tensors(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    trainer = make_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(UsageError, match="checkpoint"):
        trainer.resume()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def says_the_same(content: bytes, other: bytes) -> bool:
    try:
        return json.loads(content) == json.loads(other)
    except ValueError:
        return False


def test_flipped_byte_in_the_json_is_refused_wherever_it_is(make_trainer, tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    path = tmp_path / "checkpoint.json"
    good = path.read_bytes()
    trainer = make_trainer(tmp_path)
    for position in range(0, len(good), 3):
        content = bytearray(good)
        content[position] ^= 1
        if says_the_same(bytes(content), good):
            continue  # layout, or a digit beyond the precision of a float
        path.write_bytes(content)
        with pytest.raises(UsageError):
            trainer.resume()
    path.write_bytes(good)
    assert trainer.resume() == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"step": 1}', "{"])
def test_foreign_json_is_refused(make_trainer, content: str, tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    (tmp_path / "checkpoint.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError):
        make_trainer(tmp_path).resume()


def test_folder_without_a_checkpoint_is_refused(make_trainer, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"expected checkpoint.json of an earlier run, got none"):
        make_trainer(tmp_path).resume()


def test_tensors_that_are_gone_are_refused(make_trainer, tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    checkpoint_tensors(tmp_path).unlink()
    with pytest.raises(UsageError, match="checkpoint"):
        make_trainer(tmp_path).resume()


def test_checkpoint_of_another_model_is_refused(make_trainer, tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    other = DEQFC(DEQFCConfig(input_shape=(1, 8, 8), num_classes=10, hidden=17))
    with pytest.raises(UsageError, match="expected this config's model") as caught:
        make_trainer(tmp_path, model=other).resume()
    assert "\n" not in str(caught.value)


def test_one_pair_of_files_is_kept(make_trainer, tmp_path) -> None:
    make_trainer(tmp_path, epochs=3).run()
    assert len(list(tmp_path.iterdir())) == 2
    assert json.loads((tmp_path / "checkpoint.json").read_text())["tensors"] == checkpoint_tensors(tmp_path).name


def test_checkpoint_cut_off_while_it_is_written_leaves_the_last_one(make_trainer, tmp_path, monkeypatch) -> None:
    make_trainer(tmp_path, epochs=1).run()
    trainer = make_trainer(tmp_path)
    trainer.resume()
    kept = {name: value.clone() for name, value in trainer.average.items()}

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_module, "write_sealed", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.run()
    again = make_trainer(tmp_path)
    assert again.resume() == 1
    assert all(torch.equal(value, kept[name]) for name, value in again.average.items())


# Divergence


def test_nan_loss_ends_the_run_and_keeps_the_checkpoint(make_trainer, tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    trainer = make_trainer(tmp_path)
    trainer.resume()
    with torch.no_grad():
        trainer.model.readout.bias[3] = math.nan
    with pytest.raises(RunError, match=r"diverged in epoch 2, batch 1: .* not finite"):
        trainer.run()
    again = make_trainer(tmp_path)
    assert again.resume() == 1
    assert all(bool(torch.isfinite(value).all()) for value in again.model.state_dict().values())


class Spoiling(Attack):
    """Leaves the images alone and says that its state and adjoint are lost."""

    name, summary = "spoiling", "for tests"

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        x = batch.images
        z = model.initial_state(model.inject(x)).detach()
        mu = torch.zeros_like(z)
        z[0], z[1, 0], mu[2, 1] = math.nan, math.inf, math.nan
        return Proposal(torch.zeros_like(x), x.new_zeros(len(x)), z=z, mu=mu)


def loss_of(model: EquilibriumModel, x: Tensor, y: Tensor, **changes: object):
    options = {
        "forward": TIGHT,
        "backward": TIGHT,
        "attack": None,
        "sample_ids": torch.arange(len(x)),
        "seed": 0,
        "label_smoothing": 0.0,
        "jacobian_weight": 0.0,
        "jacobian_rows": 1,
        "generator": torch.Generator().manual_seed(0),
        **changes,
    }
    return batch_loss(model, x, y, **options)


def test_lost_state_of_an_attack_does_not_spoil_the_batch(digits) -> None:
    model, (train, _) = small_model(), digits
    x, y = train.x[:6], train.y[:6]
    spoiled = loss_of(model, x, y, attack=Spoiling(Threat(Norm.L2, 0.1)))
    spoiled.total.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss_of(model, x, y).total.backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)


# The loss


def test_solves_that_miss_their_tolerance_are_counted(make_trainer) -> None:
    loose, tight = ({"solver": "picard", "tolerance": tolerance, "max_steps": 2} for tolerance in (10.0, 1e-12))
    for forward, share in ((loose, 0.0), (tight, 1.0)):
        trainer = make_trainer(epochs=1, forward=forward, backward=loose)
        trainer.run()
        assert trainer.history[0].forward_failures == share


def test_batch_loss_is_the_mean_cross_entropy(digits) -> None:
    model, (train, _) = small_model(), digits
    x, y = train.x[:8], train.y[:8]
    result = loss_of(model, x, y)
    with torch.no_grad():
        logits = model.head(model.equilibrium(x, solve=TIGHT).value)
    expected = -logits.log_softmax(1)[torch.arange(8), y].mean()
    torch.testing.assert_close(result.total.detach(), expected, rtol=1e-4, atol=1e-5)
    assert int(result.num_correct) == int((logits.argmax(1) == y).sum())
    smoothed = loss_of(model, x, y, label_smoothing=0.2)
    blended = 0.8 * expected - 0.2 * logits.log_softmax(1).mean()
    torch.testing.assert_close(smoothed.total.detach(), blended, rtol=1e-4, atol=1e-5)


def test_adversarial_loss_is_higher_and_its_gradient_is_that_at_the_perturbed_images(digits) -> None:
    model, (train, _) = small_model(), digits
    x, y, attack = train.x[:8], train.y[:8], joint_pgd()
    result = loss_of(model, x, y, attack=attack)
    assert float(result.cross_entropy) > float(loss_of(model, x, y).cross_entropy)
    result.total.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    x_adv = attack(model, x, y, sample_ids=torch.arange(8), seed=0).x_adv
    logits = model.head(model.equilibrium(x_adv, solve=TIGHT, adjoint=Implicit(TIGHT)).value)
    torch.nn.functional.cross_entropy(logits, y).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)


def test_jacobian_weight_adds_the_estimate_on_its_rows(digits) -> None:
    model, (train, _) = small_model(), digits
    x, y = train.x[:8], train.y[:8]
    plain = loss_of(model, x, y)
    weighted = loss_of(model, x, y, jacobian_weight=2.0, jacobian_rows=3)
    z = model.equilibrium(x, solve=TIGHT).value.detach()
    extra = jacobian_norm(model, x[:3], z[:3].clone(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(weighted.total - plain.total, 2.0 * extra, rtol=1e-3, atol=1e-6)
    assert torch.equal(weighted.cross_entropy, plain.cross_entropy)


def test_jacobian_norm_has_the_closed_form_and_gradient_of_an_affine_cell(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    z = model.equilibrium(x).value.detach()
    found = jacobian_norm(model, x, z, torch.Generator().manual_seed(4))
    probe = torch.randint(0, 2, z.shape, generator=torch.Generator().manual_seed(4)).double() * 2 - 1
    a = model.a.detach()
    torch.testing.assert_close(found.detach(), (probe @ a).square().mean())
    gradient = torch.autograd.grad(found, model.a)[0]
    torch.testing.assert_close(gradient, 2 * probe.mT @ probe @ a / probe.numel())


def test_jacobian_norm_estimates_the_frobenius_norm(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(1).expand(4000, -1, -1, -1)
    z = torch.zeros(4000, 5, dtype=torch.float64)
    found = jacobian_norm(model, x, z, torch.Generator().manual_seed(0))
    assert float(found.detach()) == pytest.approx(float(model.a.detach().square().sum()) / 5, rel=0.05)


@pytest.mark.parametrize("family", ["deq-fc", "deq-conv", "mondeq-fc"])
def test_gradient_of_the_jacobian_norm_reaches_the_cell(family: str, make_model, make_images) -> None:
    model, x = make_model(family), make_images(3)
    z = model.equilibrium(x).value.detach()
    jacobian_norm(model, x, z, torch.Generator().manual_seed(0)).backward()
    sizes = [float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None]
    assert max(sizes) > 1e-4


# Shifts


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_random_shift_keeps_what_stays_in_the_frame(largest: int) -> None:
    x = torch.zeros(40, 2, 8, 8)
    x[:, :, 2:6, 2:6] = torch.rand(40, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    shifted = random_shift(x, largest, torch.Generator().manual_seed(1))
    offsets = set()
    for before, after in zip(x, shifted, strict=True):
        matches = [
            (down, right)
            for down in range(-largest, largest + 1)
            for right in range(-largest, largest + 1)
            if torch.equal(before.roll((down, right), (1, 2)), after)
        ]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert len(offsets) > 4 * largest  # both axes move, each image on its own


def test_random_shift_fills_with_zeros() -> None:
    x = torch.ones(30, 1, 4, 4)
    shifted = random_shift(x, 2, torch.Generator().manual_seed(0))
    assert shifted.shape == x.shape
    assert set(shifted.unique().tolist()) == {0.0, 1.0}
    for image in shifted[:, 0]:
        rows, columns = image.amax(1), image.amax(0)
        assert torch.equal(image, rows[:, None] * columns[None])  # still one rectangle
        assert min(int(rows.sum()), int(columns.sum())) >= 2


def test_random_shift_is_fixed_by_its_generator() -> None:
    x = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    one, same, other = (random_shift(x, 2, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_random_flip_mirrors_about_half_of_the_images_whole() -> None:
    x = torch.rand(200, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    flipped = random_flip(x, torch.Generator().manual_seed(1))
    is_mirrored = [torch.equal(after, before.flip(-1)) for before, after in zip(x, flipped, strict=True)]
    assert 70 < sum(is_mirrored) < 130
    for before, after, mirrored in zip(x, flipped, is_mirrored, strict=True):
        assert mirrored or torch.equal(after, before)


@pytest.mark.parametrize("is_on", [True, False])
def test_training_sees_mirrored_images_only_when_asked(is_on: bool, make_trainer, monkeypatch) -> None:
    seen = []
    real = loop.batch_loss
    monkeypatch.setattr(
        loop, "batch_loss", lambda model, x, *args, **rest: seen.append(x) or real(model, x, *args, **rest)
    )
    trainer = make_trainer(epochs=1, random_shift=0, random_flip=is_on)
    trainer.run()
    originals = {image.numpy().tobytes() for image in trainer.train.x}
    foreign = sum(image.numpy().tobytes() not in originals for batch in seen for image in batch)
    assert (foreign > 0) == is_on


# The config
