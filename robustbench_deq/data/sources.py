"""Where images come from: scikit-learn for `digits`, torchvision's own loaders for the rest, `npz:FILE` for one's own.

Files are looked for in `$ROBUSTBENCH_DEQ_DATA`, then in the user's cache folder, then (Fashion-MNIST) where Debian's
package `dataset-fashion-mnist` puts them; after that torchvision downloads into the cache folder.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustbench_deq.errors import UsageError
from robustbench_deq.files import remove_temporaries, replacing
from robustbench_deq.fixes import PIXEL_SLACK, label_fix
from robustbench_deq.registry import Registry
from robustbench_deq.shown import briefly_shown

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DATA_VARIABLE = "ROBUSTBENCH_DEQ_DATA"
DIMMEST = 16
"""The highest value of whole uint8 images up to which they are likely not in 0..255; `digits` come in 0..16."""
logger = logging.getLogger(__name__)


@briefly_shown
class Raw(NamedTuple):
    """All images of a source: uint8 or float `(n, channels, height, width)`, labels `(n,)`, and the official test set.

    `num_train` images come first; the rest is the official test set (0: the source has no split of its own).
    """

    images: np.ndarray
    labels: np.ndarray
    num_train: int


class DatasetInfo(NamedTuple):
    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    summary: str
    read: Callable[[], Raw]


DATASETS: Registry[DatasetInfo] = Registry("dataset")


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "robustbench-deq"


def data_folders() -> list[Path]:
    """Where files are looked for, the first place first."""
    named = os.environ.get(DATA_VARIABLE)
    return ([Path(named)] if named else []) + [cache_folder()]


def _read_digits() -> Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images[:, None] / 16 * 255).astype(np.uint8)
    return Raw(images, digits.target.astype(np.int64), 0)


def _from_torchvision(name: str, build: Callable[[Path, bool, bool], list], debian: Path | None = None) -> Raw:
    """Read both official splits with `build(folder, is_train, download)` from the first place that has them."""
    for folder in data_folders():
        whole = _read_from(folder, name, build)
        if whole is not None:
            return whole
    cache = cache_folder()
    if debian is not None and debian.is_dir():
        try:
            _unpack_fashion_mnist(debian, cache)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError.of(
                f"dataset {name}",
                expected=f"to unpack {debian} into {cache}",
                got=getattr(error, "strerror", None) or error,
                fix="reinstall the package, or make the folder writable",
            ) from None
        whole = _read_from(cache, name, build)
        if whole is not None:
            return whole
    try:
        return _join(build(cache, True, True), build(cache, False, True))
    except Exception as error:  # torchvision raises whatever its transport raises
        package = "install Debian's package dataset-fashion-mnist, or " if name == "fashion-mnist" else ""
        raise UsageError.of(
            f"dataset {name}",
            expected=f"its files in ${DATA_VARIABLE} or in {cache}, or a network to download them",
            got=f"no files, and a failed download ({type(error).__name__})",
            fix=f"{package}put torchvision's files there, or use --data digits or --data npz:FILE",
        ) from None


def _read_from(folder: Path, name: str, build: Callable[[Path, bool, bool], list]) -> Raw | None:
    """Both splits from `folder`, or None where it has none. Raises `UsageError` for files that cannot be read."""
    try:
        return _join(build(folder, True, False), build(folder, False, False))
    except Exception as error:  # torchvision raises whatever its readers raise
        if isinstance(error, RuntimeError) and "not found" in str(error):
            return None
        raise UsageError.of(
            f"dataset {name} in {folder}",
            expected="torchvision's files, whole",
            got=f"files that cannot be read ({type(error).__name__})",
            fix="remove or replace them",
        ) from None


def _join(train: object, test: object) -> Raw:
    images = [_images_of(part) for part in (train, test)]
    labels = [
        np.asarray(getattr(part, "targets", getattr(part, "labels", None)), dtype=np.int64) for part in (train, test)
    ]
    return Raw(np.concatenate(images), np.concatenate(labels), len(labels[0]))


def _images_of(part: object) -> np.ndarray:
    """torchvision keeps MNIST as (n, h, w), CIFAR as (n, h, w, c) and SVHN as (n, c, h, w)."""
    images = np.asarray(part.data)
    if images.ndim == 3:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if images.shape[-1] == 3 else images


def _unpack_fashion_mnist(debian: Path, cache: Path) -> None:
    remove_temporaries(cache / "FashionMNIST")
    for packed in sorted(debian.glob("*-ubyte.gz")):
        target = cache / "FashionMNIST" / "raw" / packed.stem
        if target.exists():
            continue
        with gzip.open(packed, "rb") as source, replacing(target) as temporary, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _read_fashion_mnist() -> Raw:
    from torchvision.datasets import FashionMNIST

    return _from_torchvision(
        "fashion-mnist", lambda folder, train, get: FashionMNIST(folder, train, download=get), DEBIAN_FASHION_MNIST
    )


def _read_mnist() -> Raw:
    from torchvision.datasets import MNIST

    return _from_torchvision("mnist", lambda folder, train, get: MNIST(folder, train, download=get))


def _read_cifar10() -> Raw:
    from torchvision.datasets import CIFAR10

    return _from_torchvision("cifar10", lambda folder, train, get: CIFAR10(folder, train, download=get))


def _read_svhn() -> Raw:
    from torchvision.datasets import SVHN

    return _from_torchvision(
        "svhn", lambda folder, train, get: SVHN(folder, "train" if train else "test", download=get)
    )


def read_npz(path: Path) -> Raw:
    """The user's own arrays `images` (n, channels, height, width) and `labels` (n,); nothing is unpickled.

    Pixels are uint8 in 0..255, or numbers in [0, 1] up to `PIXEL_SLACK`, which is clipped; labels are of any integer
    type, or truth values.

    Raises:
        UsageError: for a file that cannot be read, or anything else in it.
    """
    where, expected = f"dataset npz:{path}", "a .npz file with plain arrays 'images' and 'labels'"
    images, labels = read_arrays(path, where, expected, ("images", "labels")).values()
    if images.ndim != 4 or labels.shape != (len(images),) or labels.dtype.kind not in "biu" or not images.size:
        fix = "reshape the images" if images.size else "save some images"
        if images.ndim == 3:
            fix = "add the axis of the channel: images[:, None]"
        elif images.ndim == 4 and images.size:
            fix = label_fix(labels.shape, len(images))
        raise UsageError.of(
            where,
            expected="images (n, channels, height, width) and n integer labels",
            got=f"images {images.shape}, labels {labels.dtype} {labels.shape}",
            fix=fix,
        )
    images = as_pixels(images, where)
    if labels.min() < 0:
        raise UsageError.of(where, expected="labels >= 0", got=int(labels.min()), fix="number the classes from 0")
    return Raw(images, labels.astype(np.int64), 0)


def read_arrays(
    path: Path, where: str, expected: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of an npz by name, in the order that they are named in; nothing is unpickled.

    Args:
        where, expected: for the message.
        optional: names that may be missing, and then are.

    Raises:
        UsageError: for a file that cannot be read, or without one of `needed`.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a regular file")
        with path.open("rb") as file:  # numpy leaves one that it cannot read open
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("one array without a name")
            found = {name: archive[name] for name in (*needed, *(name for name in optional if name in archive))}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("members that are no arrays")
    except Exception as error:  # whatever numpy and zipfile raise for damaged files
        why = "no archive of arrays" if "pickle" in str(error) else error  # numpy's advice is unsafe
        got = "no such file" if isinstance(error, FileNotFoundError) else f"an unusable file ({why})"
        raise UsageError.of(where, expected=expected, got=got, fix="write it with np.savez") from None
    return found


def as_pixels(images: np.ndarray, where: str) -> np.ndarray:
    """Images as uint8, or as float32 in [0, 1]. Raises `UsageError` for other values."""
    if images.dtype != np.uint8:
        wrong = _wrong_values(images)
        if wrong is not None:
            got, fix = wrong
            raise UsageError.of(where, expected="uint8 or finite floats in [0, 1]", got=got, fix=fix)
        images = images.astype(np.float32)
        images.clip(0.0, 1.0, out=images)
    elif 0 < images.max() <= DIMMEST:
        words = "%s: uint8 images of 0 to %d are read as of 0 to 255, almost black; if %d is white, save images / %d"
        logger.warning(words, where, *[images.max()] * 3)
    return images


def _wrong_values(images: np.ndarray) -> tuple[str, str] | None:
    """What is found in images that are not numbers in [0, 1], and what to do about it."""
    if images.dtype.kind not in "biuf":
        return f"images of type {images.dtype}", "write numbers"
    num_bad = int((~np.isfinite(images).all(axis=(1, 2, 3))).sum())
    if num_bad:
        return f"NaN or infinite values in {num_bad} of {len(images)} images", "repair or remove these images"
    low, high = images.min(), images.max()
    if low >= -PIXEL_SLACK and high <= 1 + PIXEL_SLACK:
        return None
    got = f"values from {low:.7g} to {high:.7g}"
    if low < 0:
        return got, "undo a normalisation, which belongs into the model, or scale the images to [0, 1]"
    return got, "divide by 255" if 2 < high <= 255 else "scale the images to [0, 1]"


for _info in (
    DatasetInfo("digits", (1, 8, 8), 10, "scikit-learn's 8x8 digits, embedded", _read_digits),
    DatasetInfo("mnist", (1, 28, 28), 10, "MNIST, torchvision", _read_mnist),
    DatasetInfo("fashion-mnist", (1, 28, 28), 10, "Fashion-MNIST, torchvision or Debian", _read_fashion_mnist),
    DatasetInfo("cifar10", (3, 32, 32), 10, "CIFAR-10, torchvision", _read_cifar10),
    DatasetInfo("svhn", (3, 32, 32), 10, "SVHN, torchvision", _read_svhn),
):
    DATASETS.register(_info.name)(_info)
