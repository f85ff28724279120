"""`judge`: adversarial images that somebody else made, judged."""

from __future__ import annotations

from pathlib import Path

import click

from robustbench_deq.commands.attack import finish, read_setting
from robustbench_deq.commands.display import bar
from robustbench_deq.commands.shared import tell_split
from robustbench_deq.devices import choose_device
from robustbench_deq.evaluate.batch import check_data
from robustbench_deq.evaluate.external import ExternalImages, judge_images
from robustbench_deq.files import output_folder


def judge_file(
    model: str,
    file: Path,
    norm: str | None,
    epsilon: str | None,
    data: str | None,
    split: str,
    limit: int | None,
    batch_size: int,
    label: str | None,
    device: str | None,
    out: Path | None,
    is_json: bool,
) -> None:
    """Judge the images in FILE."""
    images = ExternalImages.read(file)
    loaded, threat, name, samples = read_setting(model, norm, epsilon, data, split, limit)
    target = choose_device(device, "--device")
    check_data(loaded, samples)
    images.placed(samples)
    tell_split(name, split, "--split all takes all")
    with output_folder(out) as folder:
        with bar(f"judging {file.name} on {model}", len(samples), "robust {:.1%}") as advance:
            result = judge_images(
                loaded,
                images,
                samples,
                threat,
                label=label,
                batch_size=batch_size,
                device=target,
                progress=lambda at: advance(at.done, at.robust_accuracy, at.stage),
            )
        finish(result, samples, folder, is_json)
    if out is not None and not is_json:
        click.echo(f"record            {out}")
