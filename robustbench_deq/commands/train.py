"""`train`: the model that a config describes, trained, evaluated and saved."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

import robustbench_deq.attacks  # noqa: F401  registers the attacks that the config may name
from robustbench_deq.commands.display import bar
from robustbench_deq.configs import merge, parse_assignments, read_yaml, validate
from robustbench_deq.devices import choose_device
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import alone_in, needing_space, output_folder
from robustbench_deq.report.figures.history import plot_history
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.session import TrainingSession


def train(
    config: Path, assignments: tuple[str, ...], out: Path | None, resume: Path | None, device: str | None
) -> None:
    """Train the model that CONFIG describes, evaluate it on the test split, and save it with its card."""
    values = merge(read_yaml(config), parse_assignments(assignments))
    parsed = validate(TrainingConfig, values, str(config))
    place = choose_device(device, "--device")
    if resume is not None and out is not None:
        raise UsageError.of("train", expected="--out or --resume", got="both", fix="--resume writes to its own folder")
    command = "robustbench-deq train " + " ".join(
        [shlex.quote(config.as_posix())] + [f"--set {shlex.quote(text)}" for text in assignments]
    )
    specs = [parsed.attack]  # whoever names none takes the one before
    for own in (parsed.validation.attack, parsed.evaluation.attack):
        specs.append(own or specs[-1])
    attack, validation_attack, evaluation_attack = (spec.build() if spec else None for spec in specs)
    session = TrainingSession(
        config=parsed,
        command=command,
        attack=attack,
        validation_attack=validation_attack,
        evaluation_attack=evaluation_attack,
        device=place,
        plot_history=plot_history,
    )
    target = resume or out or Path("results/runs") / parsed.name
    advice = f"what is finished is kept: make room, and continue with --resume {target}"
    with output_folder(target, resume is not None) as folder, needing_space(advice), alone_in(folder):
        session.prepare(folder)
        try:
            with bar(parsed.name, session.num_batches, "loss {:.4f}") as advance:
                described = session.run(lambda done, loss: advance(done, loss))
        except KeyboardInterrupt:
            done = len(session.trainer.history)
            raise RunError(f"interrupted after epoch {done}; continue with --resume {folder}") from None
    card = described.card
    click.echo(f"{described.name}  saved in {folder}")
    click.echo(f"clean accuracy    {card.clean_accuracy:.1%} on {card.test_samples} test images")
    if card.robust_accuracy is not None:
        low, high = card.robust_accuracy_ci
        at = f"{card.evaluated_under}, {card.evaluation['attack']}"
        click.echo(f"robust accuracy   {card.robust_accuracy:.1%}  [{low:.1%}, {high:.1%}]  {at}")
