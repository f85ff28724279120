"""Images: a few samples of a record as they were and as the attack left them, in `DIR/images/<record_id>.npz`.

They are there to be looked at. Nothing is computed from them, and a record without them is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from robustbench_deq.files import own_path, replacing
from robustbench_deq.shown import briefly_shown

IMAGES_FOLDER = "images"
NUM_IMAGES = 8


@briefly_shown
class Images(NamedTuple):
    """Arrays of one length: images `(n, channels, height, width)` in [0, 1], and classes `(n,)`."""

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    clean_predictions: np.ndarray
    adversarial_predictions: np.ndarray


def choose_images(samples: pd.DataFrame, clean: np.ndarray, adversarial: np.ndarray) -> Images:
    """The first samples that the attack made wrong, at most `NUM_IMAGES`; then the first of the others.

    Args:
        samples: the per-sample rows of a record, in the order of the images.
        clean, adversarial: `(n, channels, height, width)` in [0, 1].
    """
    is_judged = samples["is_converged"] & samples.get("is_readable", True)
    is_fooled = samples["is_clean_correct"] & ~samples["is_robust"] & is_judged
    index = np.argsort(~is_fooled.to_numpy(dtype=bool), kind="stable")[:NUM_IMAGES]
    names = ("label", "clean_prediction", "adversarial_prediction")
    return Images(clean[index], adversarial[index], *(samples[name].to_numpy()[index] for name in names))


def images_path(folder: Path, record_id: str) -> Path:
    return Path(folder) / IMAGES_FOLDER / f"{record_id}.npz"


def save_images(folder: Path, record_id: str, images: Images) -> None:
    """Write the images of a record into the folder of its records."""
    own_path(Path(folder) / IMAGES_FOLDER)
    with replacing(images_path(folder, record_id)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **images._asdict())


def load_images(folder: Path, record_id: str) -> Images | None:
    """The images of a record; None when there are none or they cannot be read."""
    try:
        with images_path(folder, record_id).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = Images(*(arrays[name] for name in Images._fields))
    except Exception:  # whatever numpy and zipfile raise for files that are empty, damaged or not ours
        return None
    return images if _are_whole(images) else None


def _are_whole(images: Images) -> bool:
    """Whether shapes and kinds are those of `Images`."""
    clean, adversarial, *classes = images
    return (
        clean.ndim == 4
        and clean.shape == adversarial.shape
        and clean.dtype.kind == adversarial.dtype.kind == "f"
        and all(part.shape == clean.shape[:1] and part.dtype.kind in "iu" for part in classes)
    )
