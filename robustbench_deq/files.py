"""Files: atomic writes, locks and digests. A reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from robustbench_deq.errors import RunError, UsageError

TEMPORARY_SUFFIX = ".partial"
LOCK_FILE = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    It is a locked file, to be written and not replaced: the lock tells it from what a killed process has left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX)
    temporary = Path(name)
    try:
        lock(handle)
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file that the user has named. Raises `UsageError` where the system does not allow it."""
    try:
        yield
    except OSError as error:
        raise UsageError.of(
            str(path), expected="a file that can be written", got=error.strerror, fix="name another"
        ) from None


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of space."""
    return isinstance(error, OSError) and error.errno in NO_SPACE


@contextlib.contextmanager
def needing_space(advice: str) -> Iterator[None]:
    """Around writing. Raises `RunError` with the advice when the disk is full."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise RunError(f"no space left on the disk; {advice}") from error
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove the files that killed processes have left in `folder` and below while they were `replacing` others."""
    for place, _, names in os.walk(folder):
        for name in names:
            if _is_temporary(name) and _is_abandoned(path := Path(place, name)):
                path.unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def _is_abandoned(path: Path) -> bool:
    """Whether no living process is writing a temporary file or folder; False where there are no locks to tell by."""
    try:
        handle = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def is_blank(folder: Path) -> bool:
    """Whether a folder has nothing but hidden files, which a killed run may have left, or is not there."""
    return not is_folder(folder) or all(entry.name.startswith(".") for entry in folder.iterdir())


def refuse_links(folder: Path) -> None:
    """See that nothing in an output folder is a symbolic link, through which files elsewhere would be changed.

    Raises:
        UsageError: for the first one.
    """
    for place, folders, names in os.walk(folder):
        for name in folders + names:
            own_path(Path(place, name))


def own_path(path: Path) -> Path:
    """`path`, of an output folder. Raises `UsageError` when it is a symbolic link."""
    if os.path.islink(path):
        raise UsageError.of(
            str(path), expected="a file or folder of the run's own", got="a symbolic link", fix="remove it"
        )
    return path


def open_own(path: Path, flags: int = 0) -> int:
    """A handle for reading and writing a file of an output folder, which is made if it is missing."""
    return os.open(own_path(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o644)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises `UsageError` when another process is in such a block with the same folder."""
    path = folder / LOCK_FILE
    handle = open_own(path)
    try:
        if not lock(handle, waits=False) or not _is_at(handle, path):
            raise UsageError.of(
                f"folder {folder}",
                expected="one that no other run is writing",
                got="one in use",
                fix="wait until that run ends, or name another folder",
            )
        try:
            yield
        finally:
            if _is_at(handle, path):
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def lock(handle: int, waits: bool = True) -> bool:
    """Lock an open file until it is closed or the process ends; False when another has it and this one does not wait.

    Where the file system has no locks, everybody gets one.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is not UTF-8 or not JSON, or is nested too deeply to read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """As `write_json`, and under "sha256" a digest of the content, so that damage does not pass unseen."""
    write_text(path, _sealed(content))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` has written; None where a single bit of it has changed. Raises `OSError` as reading does."""
    text = path.read_bytes()
    try:
        content = json.loads(text)
        del content["sha256"]
        return content if _sealed(content).encode() == text else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _sealed(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def check_json(path: Path, content: dict[str, Any], but: Collection[str] = ()) -> None:
    """See that a folder's `path` was written from `content`, whatever it has under the keys in `but`.

    Raises:
        UsageError: when it is no JSON object, or another one.
    """
    try:
        earlier = read_json(path)
    except (OSError, ValueError) as error:
        earlier = "none" if isinstance(error, FileNotFoundError) else "an unreadable one"
    if not isinstance(earlier, dict):
        got = earlier if isinstance(earlier, str) else f"a JSON {type(earlier).__name__}"
        raise UsageError.of(
            f"folder {path.parent}", expected=f"the {path.name} of an earlier run", got=got, fix="name a new folder"
        )
    changed = [key for key in content | earlier if key not in but and earlier.get(key) != content.get(key)]
    if changed:
        raise UsageError.of(
            f"folder {path.parent}",
            expected=f"the {path.stem} it was made from",
            got=f"another {changed[0]}",
            fix="use that one, or name a new folder",
        )


def is_folder(name: str | Path) -> bool:
    """Whether there is such a folder; False for names that no file can have, which are too long for instance."""
    return os.path.isdir(name)


def is_file(name: str | Path) -> bool:
    """Likewise of a file."""
    return os.path.isfile(name)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def output_folder(path: Path | None, is_resumed: bool = False) -> Iterator[Path | None]:
    """`path` as a new or empty folder that can be written; removed again, with the folders above that were made for it,
    if the block fails and leaves it empty.

    Args:
        is_resumed: it may hold something.

    Raises:
        UsageError: when it holds something or cannot be written.
    """
    if path is None:
        yield None
        return
    made = [folder for folder in (path, *path.parents) if not is_folder(folder)]  # the innermost first
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if all(_is_temporary(entry.name) for entry in path.iterdir()):
                remove_temporaries(path)
            if not is_resumed and any(path.iterdir()):
                raise UsageError.of(
                    f"output folder {path}",
                    expected="an empty or new folder",
                    got="one with files",
                    fix="remove it, or name another with --out",
                )
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UsageError.of(
                f"output folder {path}", expected="a folder that can be written", got=error.strerror, fix="name another"
            ) from None
        made = [path, *made[1:]]
        yield path
    except BaseException:
        for folder in made:
            if is_folder(folder) and not any(folder.iterdir()):
                folder.rmdir()
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error; until then `path` holds nothing.

    Raises:
        UsageError: as `output_folder`.
    """
    path = path.resolve()
    if path == Path.cwd():
        raise UsageError.of(
            "output folder .", expected="a folder below the current one", got="the current one", fix="name another"
        )
    with output_folder(path):
        try:
            for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
                if left.is_dir() and _is_abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX))
            handle = os.open(temporary, os.O_RDONLY)
            lock(handle)
        except OSError as error:
            raise UsageError.of(
                f"output folder {path}",
                expected="a parent folder that can be written",
                got=error.strerror,
                fix="name another",
            ) from None
        try:
            yield temporary
            temporary.chmod(0o755)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(handle)
