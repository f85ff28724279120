"""Splits, loaders on tiny files in the published formats, and refusals. The network is never touched."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import time
import urllib.error
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from robustbench_deq.data import DATASETS, SplitName, load, sources, split_sizes, splits
from robustbench_deq.data.splits import split_ids
from robustbench_deq.errors import UsageError
from robustbench_deq.fixes import PIXEL_SLACK

NUM_TRAIN, NUM_TEST = 20, 12
THREE = (SplitName.TRAIN, SplitName.VALIDATION, SplitName.TEST)
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}
DIGITS_TEST_DIGEST = "225677d233cae9d9af38780e6ea2e2308c3e3a647e669713f17dd30a716cfa9b"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty folders to look in, no network, and nothing remembered from the last test. Gives the named folder."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    for name in TORCHVISION.values():
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path / "data"))
    splits._kept.cache_clear()
    yield tmp_path / "data"
    splits._kept.cache_clear()


def random_images(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def labels_of(n: int) -> np.ndarray:
    return np.arange(n) % 10


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(raw: Path) -> np.ndarray:
    images = random_images(NUM_TRAIN + NUM_TEST, 28, 28)
    labels = labels_of(len(images))
    for stem, part in (("train", slice(0, NUM_TRAIN)), ("t10k", slice(NUM_TRAIN, None))):
        write_idx(raw / f"{stem}-images-idx3-ubyte", images[part])
        write_idx(raw / f"{stem}-labels-idx1-ubyte", labels[part])
    return images[:, None]


def write_pickle(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    images = random_images(NUM_TRAIN + NUM_TEST, 3, 32, 32)
    labels, base = labels_of(len(images)), folder / "cifar-10-batches-py"
    parts = {f"data_batch_{i + 1}": slice(4 * i, 4 * i + 4) for i in range(5)} | {"test_batch": slice(NUM_TRAIN, None)}
    digests = []
    for name, part in parts.items():
        content = {"data": images[part].reshape(-1, 3072), "labels": labels[part].tolist()}
        digests.append([name, write_pickle(base / name, content)])
    meta = write_pickle(base / "batches.meta", {"label_names": [str(i) for i in range(10)]})
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", digests[:5])
    monkeypatch.setattr(cifar, "test_list", digests[5:])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": meta})
    return images


def write_svhn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    images = random_images(NUM_TRAIN + NUM_TEST, 3, 32, 32)
    labels = np.where(labels_of(len(images)) == 0, 10, labels_of(len(images)))  # SVHN writes class 0 as 10
    folder.mkdir(parents=True)
    digests = {}
    for name, part in (("train", slice(0, NUM_TRAIN)), ("test", slice(NUM_TRAIN, None))):
        path = folder / f"{name}_32x32.mat"
        scipy.io.savemat(path, {"X": images[part].transpose(2, 3, 1, 0), "y": labels[part, None]})
        digests[name] = [None, path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", digests)
    return images


def write_files(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The images written, `(n, channels, height, width)`, the training set first."""
    if name == "cifar10":
        return write_cifar10(folder, monkeypatch)
    if name == "svhn":
        return write_svhn(folder, monkeypatch)
    return write_mnist(folder / TORCHVISION[name] / "raw")


def check_against(name: str, images: np.ndarray) -> None:
    """All three splits hold the written images, in [0, 1], each once, the official test set apart."""
    seen = []
    for split in THREE:
        part = load(name, split)
        ids = part.sample_ids.numpy()
        assert part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert tuple(part.x.shape[1:]) == DATASETS.get(name).input_shape
        np.testing.assert_array_equal(np.rint(part.x.numpy() * 255).astype(np.uint8), images[ids])
        np.testing.assert_array_equal(part.y.numpy(), labels_of(len(images))[ids])
        assert bool(((ids >= NUM_TRAIN) == (split is SplitName.TEST)).all())
        seen.extend(ids.tolist())
    assert sorted(seen) == list(range(NUM_TRAIN + NUM_TEST))


# Splits


@given(st.integers(3, 500), st.booleans())
def test_splits_are_disjoint_and_cover_everything(num_samples: int, has_test: bool) -> None:
    num_train = num_samples * 2 // 3 if has_test else 0
    parts = {split: split_ids(num_samples, num_train, split) for split in THREE}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(num_samples))
    if has_test:
        assert sorted(parts[SplitName.TEST].tolist()) == list(range(num_train, num_samples))
    for split, ids in parts.items():
        np.testing.assert_array_equal(split_ids(num_samples, num_train, split), ids)


def test_digits_are_cut_into_three() -> None:
    parts = {split: load("digits", split) for split in THREE}
    ids = torch.cat([part.sample_ids for part in parts.values()])
    assert sorted(ids.tolist()) == list(range(1797))
    assert {split.value: len(part) for split, part in parts.items()} == {"train": 1134, "validation": 150, "test": 513}
    for part in parts.values():
        assert part.x.shape == (len(part), 1, 8, 8) and part.y.shape == (len(part),)
        assert float(part.x.min()) == 0.0 and float(part.x.max()) == 1.0
        assert set(part.y.tolist()) == set(range(10))


def test_digest_is_fixed() -> None:
    first = load("digits").digest
    splits._kept.cache_clear()
    assert load("digits").digest == first == DIGITS_TEST_DIGEST


def test_digest_tells_splits_and_limits_apart() -> None:
    parts = [load("digits"), load("digits", SplitName.TRAIN), load("digits", limit=10), load("digits", limit=11)]
    assert len({part.digest for part in parts}) == 4


def test_limit_takes_the_first_samples() -> None:
    whole, part = load("digits"), load("digits", limit=7)
    assert len(part) == 7
    assert torch.equal(part.x, whole.x[:7]) and torch.equal(part.y, whole.y[:7])
    assert torch.equal(part.sample_ids, whole.sample_ids[:7])
    assert len(load("digits", limit=513)) == 513


@pytest.mark.parametrize(
    ("limit", "fix"), [(0, "take one image at least"), (-1, "take one image at least"), (514, "lower it")]
)
def test_limit_beyond_the_data_is_refused(limit: int, fix: str) -> None:
    expected = f"limit: expected 1 to 513, the size of digits's test split, got {limit}; {fix}$"
    with pytest.raises(UsageError, match=expected):
        load("digits", limit=limit)


def test_what_one_caller_does_to_a_split_does_not_reach_the_next() -> None:
    load("digits").x.zero_()
    load("digits").y.zero_()
    assert float(load("digits").x.max()) == 1.0
    assert int(load("digits").y.max()) == 9


def test_unknown_dataset_lists_the_close_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown dataset: expected one of .*digits.*, got 'digit'"):
        load("digit")


# torchvision's formats


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_files_in_the_named_folder_are_read(name: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against(name, write_files(name, nowhere, monkeypatch))


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_files_in_the_cache_folder_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against(name, write_files(name, sources.cache_folder(), monkeypatch))


def test_named_folder_comes_before_the_cache(nowhere: Path) -> None:
    write_mnist(sources.cache_folder() / "MNIST" / "raw")
    write_idx(sources.cache_folder() / "MNIST" / "raw" / "t10k-images-idx3-ubyte", np.zeros((NUM_TEST, 28, 28)))
    check_against("mnist", write_mnist(nowhere / "MNIST" / "raw"))


def test_debian_package_is_unpacked(tmp_path: Path) -> None:
    images = write_mnist(tmp_path / "plain")
    (tmp_path / "debian").mkdir()
    for path in (tmp_path / "plain").iterdir():
        (tmp_path / "debian" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    check_against("fashion-mnist", images)
    assert (sources.cache_folder() / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").is_file()


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_missing_files_without_a_network_name_all_the_ways(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"dataset {name}: expected its files in $ROBUSTBENCH_DEQ_DATA or in ")
    for way in (str(sources.cache_folder()), "network", "--data digits", "--data npz:FILE", "URLError"):
        assert way in message
    assert ("dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    assert "\n" not in message


def test_half_of_the_files_is_not_enough(nowhere: Path) -> None:
    write_mnist(nowhere / "MNIST" / "raw")
    (nowhere / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="dataset mnist: expected its files"):
        load("mnist")


def test_truncated_files_are_refused(nowhere: Path) -> None:
    write_mnist(nowhere / "MNIST" / "raw")
    path = nowhere / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="dataset mnist"):
        load("mnist")


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_files_with_another_digest_are_never_opened(name: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # CIFAR-10 is published as pickles: the digest check is what keeps a foreign one from running.
    write_files(name, nowhere, monkeypatch)
    path = nowhere / ("cifar-10-batches-py/data_batch_3" if name == "cifar10" else "train_32x32.mat")

    class Canary:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return pytest.fail, ("a foreign pickle was opened",)

    path.write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UsageError, match=f"dataset {name}"):
        load(name)


# One's own arrays


def write_npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_npz_is_read_and_cut_into_three(tmp_path: Path) -> None:
    images = random_images(30, 3, 5, 4)
    name = write_npz(tmp_path / "own.npz", images=images, labels=labels_of(30).astype(np.int32))
    seen = []
    for split in THREE:
        part = load(name, split)
        np.testing.assert_allclose(part.x.numpy(), images[part.sample_ids.numpy()] / 255, atol=1e-6)
        np.testing.assert_array_equal(part.y.numpy(), labels_of(30)[part.sample_ids.numpy()])
        seen.extend(part.sample_ids.tolist())
    assert sorted(seen) == list(range(30))


def test_npz_is_taken_whole(tmp_path: Path) -> None:
    images = random_images(30, 1, 2, 2)
    name = write_npz(tmp_path / "own.npz", images=images, labels=labels_of(30))
    whole, part = load(name, SplitName.ALL), load(name, SplitName.ALL, 9)
    ids = whole.sample_ids.numpy()
    assert sorted(ids) == list(range(30)) and list(ids) != sorted(ids)  # the first of them are a random sample
    np.testing.assert_array_equal(np.rint(whole.x.numpy() * 255), images[ids])
    assert torch.equal(part.sample_ids, whole.sample_ids[:9]) and part.digest != whole.digest
    assert [split_sizes(name, split) for split in SplitName] == [(19, 30), (2, 30), (9, 30), (30, 30)]


def test_all_of_a_source_with_a_training_set_is_refused() -> None:
    with pytest.raises(UsageError, match="dataset digits: expected train, validation or test as the split, got all"):
        load("digits", SplitName.ALL)


def test_npz_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    images = random_images(30, 1, 2, 2) / 255
    part = load(write_npz(tmp_path / "own.npz", images=images, labels=labels_of(30)))
    np.testing.assert_array_equal(part.x.numpy(), images.astype(np.float32)[part.sample_ids.numpy()])


GOOD = np.full((6, 1, 2, 2), 0.5)
ZEROS = np.zeros(6, dtype=np.int64)


def spoiled(value: float) -> np.ndarray:
    images = GOOD.copy()
    images[3, 0, 1, 1] = value
    return images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": spoiled(1.5), "labels": ZEROS},
            r"\[0, 1\], got values from 0.5 to 1.5; scale the images to \[0, 1",
        ),
        ({"images": spoiled(-0.1), "labels": ZEROS}, "got values from -0.1 to 0.5; undo a normalisation"),
        ({"images": spoiled(np.nan), "labels": ZEROS}, "got NaN or infinite values in 1 of 6 images; repair or remove"),
        ({"images": spoiled(-np.inf), "labels": ZEROS}, "got NaN or infinite values in 1 of 6 images; repair or"),
        ({"images": np.full((6, 1, 2, 2), 200), "labels": ZEROS}, "got values from 200 to 200; divide by 255"),
        ({"images": GOOD + 700, "labels": ZEROS}, "got values from 700.5 to 700.5; scale the images"),
        ({"images": GOOD[:, 0], "labels": ZEROS}, r"expected images \(n, channels, height, width\)"),
        ({"images": GOOD, "labels": ZEROS[:5]}, r"n integer labels, got images \(6, 1, 2, 2\), labels int64 \(5,\)"),
        ({"images": GOOD, "labels": ZEROS.astype(float)}, "n integer labels"),
        ({"images": GOOD, "labels": ZEROS[:, None]}, "n integer labels"),
        ({"images": GOOD[:0], "labels": ZEROS[:0]}, "n integer labels"),
        ({"images": GOOD[:, :, :, :0], "labels": ZEROS}, r"expected images \(n, channels, height, width\)"),
        ({"images": GOOD, "labels": ZEROS - 1}, "expected labels >= 0, got -1"),
        ({"images": GOOD}, "expected a .npz file with plain arrays 'images' and 'labels'"),
        ({"labels": ZEROS}, "expected a .npz file with plain arrays 'images' and 'labels'"),
        ({"images": np.full((6, 1, 2, 2), "a"), "labels": ZEROS}, "got images of type <U1; write numbers"),
        ({"images": GOOD.astype(complex), "labels": ZEROS}, "expected uint8 or finite floats in"),
    ],
)
def test_bad_npz_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(write_npz(tmp_path / "own.npz", **arrays))
    assert "own.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_npz_with_objects_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return pytest.fail, ("unpickled",)

    images = np.empty((6, 1, 2, 2), dtype=object)
    images[:] = Canary()
    with pytest.raises(UsageError, match="plain arrays"):
        load(write_npz(tmp_path / "own.npz", images=images, labels=ZEROS))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"text", pickle.dumps([1, 2])])
def test_file_that_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="an unusable file") as caught:
        load(f"npz:{path}")
    assert "\n" not in str(caught.value)


def test_plain_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", GOOD)
    with pytest.raises(UsageError, match=r"expected a \.npz file"):
        load(f"npz:{tmp_path / 'own.npy'}")


@pytest.mark.parametrize("position", [100, 200, 300])
def test_damaged_npz_is_refused(position: int, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez_compressed(path, images=random_images(60, 1, 4, 4), labels=labels_of(60))
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UsageError, match="an unusable file"):
        load(f"npz:{path}")


def test_missing_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got no such file"):
        load(f"npz:{tmp_path / 'none.npz'}")
    with pytest.raises(UsageError, match="an unusable file"):
        load(f"npz:{tmp_path}")


def test_split_without_samples_is_refused(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "own.npz", images=GOOD[:1], labels=ZEROS[:1])
    assert len(load(name)) == 1
    for split in (SplitName.TRAIN, SplitName.VALIDATION):
        with pytest.raises(UsageError, match=f"{split.value} split"):
            load(name, split)


# ---------------------------------------------------------------- what a file holds now


def npz_at(path: Path, value: float, age: float = 100.0) -> None:
    """Four images of `value`, in a file that was written `age` seconds ago, as far as anybody can tell."""
    write_npz(path, images=np.full((4, 1, 2, 2), value, np.float32), labels=labels_of(4))
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize("recent", [0.0, splits.RECENT_SECONDS])
def test_an_npz_is_what_the_file_holds_now(recent: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "RECENT_SECONDS", recent)
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        for value in (0.25, 0.75):
            npz_at(Path("own.npz"), value)
            time.sleep(0.02)  # longer than a tick of the clock of files
            for name in ("npz:own.npz", Path("own.npz"), f"npz:{folder / 'own.npz'}"):
                assert float(load(name, SplitName.ALL).x.mean()) == value


def test_an_npz_that_does_not_change_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "RECENT_SECONDS", 0.0)
    name, reads = write_npz(tmp_path / "own.npz", images=GOOD, labels=ZEROS), []
    monkeypatch.setattr(splits, "read_npz", lambda path: reads.append(path) or sources.read_npz(path))
    assert load(name, SplitName.ALL).digest == load(name, SplitName.ALL).digest and len(reads) == 1


def test_a_data_folder_that_is_named_later_is_looked_into(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sources.DatasetInfo("here", (1, 2, 2), 2, "", lambda: sources.read_npz(sources.data_folders()[0] / "a.npz"))
    monkeypatch.setitem(vars(sources.DATASETS)["_entries"], "here", here)
    for number, folder in enumerate((nowhere.parent / "first", nowhere.parent / "second")):
        folder.mkdir()
        npz_at(folder / "a.npz", number / 2)
        monkeypatch.setenv(sources.DATA_VARIABLE, str(folder))
        assert float(load("here").x.mean()) == number / 2


# ---------------------------------------------------------------- labels and pixels


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.uint64, bool])
def test_npz_labels_of_any_integer_type_are_taken(dtype: type, tmp_path: Path) -> None:
    whole = load(write_npz(tmp_path / "own.npz", images=GOOD, labels=(np.arange(6) % 2).astype(dtype)), SplitName.ALL)
    assert whole.y.dtype is torch.int64 and torch.equal(whole.y, whole.sample_ids % 2)


@pytest.mark.parametrize(
    ("arrays", "fix"),
    [
        ({"labels": np.eye(6)}, r"one class index per image: labels.argmax\(1\) of one-hot rows"),
        ({"labels": ZEROS[:, None]}, r"one class index per image: labels.ravel\(\)"),
        ({"labels": ZEROS.astype(float)}, r"labels.astype\(int\) of an array"),
        ({"images": GOOD[:, 0]}, r"add the axis of the channel: images\[:, None\]"),
        ({"images": GOOD[:, 0, 0]}, "reshape the images"),
    ],
)
def test_bad_npz_is_refused_with_its_fix(arrays: dict[str, np.ndarray], fix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=fix):
        load(write_npz(tmp_path / "own.npz", **{"images": GOOD, "labels": ZEROS, **arrays}))


def test_npz_floats_a_rounding_error_outside_are_clipped(tmp_path: Path) -> None:
    for low, high in ((-1e-9, 1 + 1e-9), (-PIXEL_SLACK / 2, 1 + PIXEL_SLACK / 2)):
        images = np.linspace(low, high, 24).reshape(6, 1, 2, 2)
        x = load(write_npz(tmp_path / "own.npz", images=images, labels=ZEROS), SplitName.ALL).x
        assert float(x.min()) == 0.0 and float(x.max()) == 1.0
    with pytest.raises(UsageError, match=r"got values from 0 to 1.0001; scale the images"):
        load(write_npz(tmp_path / "own.npz", images=np.linspace(0, 1.0001, 24).reshape(6, 1, 2, 2), labels=ZEROS))


@pytest.mark.parametrize(("highest", "is_odd"), [(0, False), (1, True), (16, True), (17, False), (255, False)])
def test_uint8_images_that_are_almost_black_get_a_word(highest: int, is_odd: bool, tmp_path: Path, caplog) -> None:
    images = np.full((6, 1, 2, 2), highest, np.uint8)
    load(write_npz(tmp_path / "own.npz", images=images, labels=ZEROS))
    assert bool(caplog.messages) == is_odd
    if is_odd:
        assert f"uint8 images of 0 to {highest} are read as of 0 to 255" in caplog.messages[0]


def test_an_npz_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "circle.npz").symlink_to("circle.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        for member in ("images", "labels"):
            archive.writestr(member, "text")
    for name in ("circle.npz", "pipe.npz", "text.npz", "\0.npz"):
        with pytest.raises(UsageError, match=r"expected a \.npz file with plain arrays"):
            load(f"npz:{tmp_path / name}", SplitName.ALL)
