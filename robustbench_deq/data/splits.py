"""Fixed splits: train, validation and test, drawn once with a written seed.

The official test set is the test split; a source without one is cut into three. Order is a fixed permutation, so that
the first `limit` samples are a random sample, the same for everybody. The test split is never used to choose anything.
A file of one's own may be a prepared test set, and be taken whole: `SplitName.ALL`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustbench_deq.configs import Config, validate
from robustbench_deq.data.sources import DATASETS, Raw, data_folders, read_npz
from robustbench_deq.errors import UsageError
from robustbench_deq.shown import briefly_shown

SPLIT_SEED = 20211124
VALIDATION_FRACTION = 1 / 12
TEST_FRACTION = 2 / 7


class SplitName(enum.Enum):
    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    ALL = "all"
    """Every sample, of an `npz:FILE` only: of other sources it would hold what models were trained on."""


@briefly_shown
@dataclass(frozen=True)
class Split:
    """Samples of one split.

    x            images `(n, channels, height, width)`, float32 in [0, 1]
    y            classes `(n,)`
    sample_ids   positions in the source `(n,)`: what a sample's randomness is keyed by
    digest       sha256 over images, labels and ids
    largest_label    of the whole source
    """

    name: str
    split: SplitName
    x: Tensor
    y: Tensor
    sample_ids: Tensor
    digest: str
    largest_label: int = 0

    def __len__(self) -> int:
        return len(self.x)


def to_unit(images: np.ndarray) -> Tensor:
    """uint8 0..255 or float [0, 1] to float32 [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


def is_own_file(name: str) -> bool:
    """Whether a dataset's name is `npz:FILE`."""
    return name.startswith("npz:")


RECENT_SECONDS = 2.0
"""A file that was written within these is read every time: the system's clock of files may be too coarse to tell that
it is written again."""


def _read(name: str) -> Raw:
    """What a name means now. Kept is what was read of the same file, as long and as old, or in the same folders."""
    if not is_own_file(name):
        return _kept(name, *map(str, data_folders()))
    path = Path(name.removeprefix("npz:"))
    try:
        path = path.resolve()
        found = path.stat()
    except (OSError, ValueError, RuntimeError):  # the latter two: a null character, a circle of links
        return read_npz(path)  # which says what is wrong
    if time.time() - found.st_ctime < RECENT_SECONDS:
        return read_npz(path)
    return _kept(name, str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=2)
def _kept(name: str, place: str, *_: object) -> Raw:
    return read_npz(Path(place)) if is_own_file(name) else DATASETS.get(name).read()


def split_ids(num_samples: int, num_train: int, split: SplitName) -> np.ndarray:
    """Positions of a split in its fixed order. All but `ALL` are disjoint and together hold every sample."""
    stream = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    if split is SplitName.ALL:
        return stream.permutation(num_samples)
    if num_train:
        pool, test = stream.permutation(num_train), num_train + stream.permutation(num_samples - num_train)
    else:
        order = stream.permutation(num_samples)
        num_test = max(1, round(num_samples * TEST_FRACTION))
        test, pool = order[:num_test], order[num_test:]
    num_validation = round(num_samples * VALIDATION_FRACTION)
    parts = {SplitName.TEST: test, SplitName.VALIDATION: pool[:num_validation], SplitName.TRAIN: pool[num_validation:]}
    return parts[split]


def split_sizes(name: str, split: SplitName) -> tuple[int, int]:
    """How many samples a split has, and how many its source. Raises `UsageError` as `load`."""
    raw = _read(name)
    return len(split_ids(len(raw.labels), raw.num_train, split)), len(raw.labels)


class Request(Config):
    """What `load` is asked for."""

    name: str = Field(description="a dataset or npz:FILE")
    split: SplitName
    limit: int | None


def load(name: str | os.PathLike[str], split: SplitName | str = SplitName.TEST, limit: int | None = None) -> Split:
    """The first `limit` samples of a split.

    Args:
        name: of `DATASETS`, `npz:FILE`, or the path of such a file.
        split: or its name.
        limit: None is all of them.

    Raises:
        UsageError: for an unknown name, files that cannot be had, an empty split, a limit beyond the data, or all
            samples of a source that has a split of its own.
    """
    if isinstance(name, os.PathLike):
        name = f"npz:{os.fspath(name)}"
    asked = validate(Request, {"name": name, "split": split, "limit": limit}, "load")
    name, split, limit = asked.name, asked.split, asked.limit
    raw = _read(name)
    if split is SplitName.ALL and not is_own_file(name):
        raise UsageError.of(
            f"dataset {name}",
            expected="train, validation or test as the split",
            got="all, which would hold what models were trained on",
            fix="take one of the three",
        )
    ids = split_ids(len(raw.labels), raw.num_train, split)
    if not len(ids):
        raise UsageError.of(
            f"dataset {name}",
            expected=f"enough samples for a {split.value} split",
            got=f"{len(raw.labels)} in all",
            fix="add samples",
        )
    if limit is not None:
        if not 1 <= limit <= len(ids):
            raise UsageError.of(
                "limit",
                expected=f"1 to {len(ids)}, the size of {name}'s {split.value} split",
                got=limit,
                fix="lower it" if limit > len(ids) else "take one image at least",
            )
        ids = ids[:limit]
    images, labels = raw.images[ids], raw.labels[ids]
    digest = hashlib.sha256()
    for part in (np.ascontiguousarray(images), labels, ids):
        digest.update(part.tobytes())
    tensors = to_unit(images), torch.from_numpy(labels), torch.from_numpy(ids)
    return Split(name, split, *tensors, digest.hexdigest(), int(raw.labels.max()))
