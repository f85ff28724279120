"""Files: what killed processes leave is told from what living ones write, links are not followed, seals show damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import (
    alone_in,
    is_blank,
    is_file,
    needing_space,
    output_folder,
    own_path,
    read_sealed,
    refuse_links,
    remove_temporaries,
    replacing,
    whole_folder,
    write_sealed,
    write_text,
)


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    dead = tmp_path / "below" / ".one.json.abc.partial"
    dead.write_text("{")
    (tmp_path / ".hidden").write_text("mine")
    with replacing(tmp_path / "below" / "two.json") as living:
        remove_temporaries(tmp_path)
        assert living.exists() and not dead.exists()
        living.write_text("{}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "below", "two.json"]


def test_a_folder_with_leftovers_alone_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / ".suite.json.abc.partial").write_text("{")
    with output_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".suite.json.abc.partial").write_text("{")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="empty or new"), output_folder(tmp_path):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_a_whole_folder_removes_what_a_killed_one_has_left_beside_it(tmp_path: Path) -> None:
    for name in (".page.abc.partial", ".other.abc.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text("")
    with whole_folder(tmp_path / "page") as temporary:
        write_text(temporary / "index.html", "<p>")
        with pytest.raises(RuntimeError), whole_folder(tmp_path / "page"):
            raise RuntimeError  # another one, which leaves the first alone
        assert (temporary / "index.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abc.partial", "page"]


@pytest.mark.parametrize("place", ["records.jsonl", "shards", "shards/key.lock", ".lock"])
def test_a_link_in_an_output_folder_is_refused(place: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "elsewhere"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).symlink_to(target)
    with pytest.raises(UsageError, match=rf"{place}: expected a file or folder of the run's own, got a symbolic link"):
        refuse_links(folder)
    (tmp_path / "link").symlink_to(tmp_path)  # the folder itself may lie anywhere
    refuse_links(tmp_path / "link" / "empty")
    if place == ".lock":
        with pytest.raises(UsageError, match="symbolic link"), alone_in(folder):
            pass
    assert not target.exists()


def test_one_process_at_a_time_has_a_folder_and_a_killed_one_does_not_keep_it(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with alone_in(tmp_path):
        with pytest.raises(UsageError, match="that no other run is writing, got one in use"), alone_in(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded")],
    ids=repr,
)
def test_a_full_disk_is_one_line_with_advice(error: Exception) -> None:
    with pytest.raises(RunError, match=r"\Ano space left on the disk; make room\Z"), needing_space("make room"):
        raise error
    with pytest.raises(PermissionError), needing_space("make room"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_seal_shows_every_bit_that_flips(tmp_path: Path) -> None:
    path, content = tmp_path / "sealed.json", {"a": [1, 1e-05, None, "é"], "b": {"c": 0.1, "d": -0.0}}
    write_sealed(path, content)
    good = path.read_bytes()
    assert read_sealed(path) == content and json.loads(good)["a"] == content["a"]
    for bit in range(0, 8 * len(good), 3):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert read_sealed(path) is None, bytes(damaged)
    for text in ("", "{}", "[]", "null", "[" * 100_000, json.dumps(content)):
        path.write_text(text)
        assert read_sealed(path) is None
    os.unlink(path)
    with pytest.raises(FileNotFoundError):
        read_sealed(path)


def test_names_that_no_file_can_have_are_of_none(tmp_path: Path) -> None:
    path = tmp_path / "made" / ("x" * 300)
    assert own_path(path) == path and is_blank(path) and not is_file(path)
    refuse_links(path)
    for place in (output_folder, whole_folder):
        with pytest.raises(UsageError, match="folder that can be written, got File name too long"), place(path):
            pass
        assert list(tmp_path.iterdir()) == []
