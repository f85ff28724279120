"""What several commands say: what a split leaves out."""

from __future__ import annotations

import click

from robustbench_deq.data import SplitName, is_own_file, split_sizes


def tell_split(data: str, split: str, whole: str) -> None:
    """Say that a split leaves out a part of one's own file, which may be a test set as it is.

    Args:
        whole: what takes all of it, with a place for how many.
    """
    if is_own_file(data) and split != SplitName.ALL.value:
        size, num_samples = split_sizes(data, SplitName(split))
        click.echo(f"{data}: {split} split: {size} of {num_samples} images; {whole.format(num_samples)}", err=True)
