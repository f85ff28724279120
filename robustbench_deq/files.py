"""Files: atomic writes, locks and digests. A reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from robustbench_deq.errors import UsageError

TEMPORARY_SUFFIX = ".partial"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file that the user has named. Raises `UsageError` where the system does not allow it."""
    try:
        yield
    except OSError as error:
        raise UsageError.of(
            str(path), expected="a file that can be written", got=error.strerror, fix="name another"
        ) from None


def remove_temporaries(folder: Path) -> None:
    """Remove the files that killed processes have left in `folder` while they were `replacing` others."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_file():
            path.unlink(missing_ok=True)


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
def output_folder(path: Path | None) -> Iterator[Path | None]:
    """`path` as a new or empty folder that can be written; removed again, with the folders above that
    were made for it, if the block fails and leaves it empty.

    Raises:
        UsageError: when it holds something or cannot be written.
    """
    if path is None:
        yield None
        return
    made = [folder for folder in (path, *path.parents) if not is_folder(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
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
    try:
        yield path
    except BaseException:
        for folder in [path, *made[1:]]:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
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
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
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
