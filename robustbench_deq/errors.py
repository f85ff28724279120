"""The two ways a call can go wrong, and what of a long value a message shows.

`UsageError`  the caller gave something unusable; the message says what was expected, what came, and how to fix it.
`RunError`    the input was fine and the work failed; the message says what failed and what was kept.

The command line turns the first into exit code 2 and the second into exit code 1.
"""

import os
import reprlib
import traceback
from pathlib import Path

MAX_SHOWN = 300
"""Characters of each part of a message."""
MAX_MESSAGE = 1500
"""Characters of a whole one."""

_EXCERPT = reprlib.Repr()
_EXCERPT.maxlevel, _EXCERPT.maxlong = 4, 60
_EXCERPT.maxstring = _EXCERPT.maxother = 120


def shortened(text: str, most: int = MAX_SHOWN) -> str:
    """`text`, or its beginning and end where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[len(text) - most // 4 :]}"


def excerpt(value: object) -> str:
    """The representation of `value`; of a long or deep one a part, which costs no more than is shown."""
    try:
        return shortened(_EXCERPT.repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} too long to show"


def kind_of(value: object) -> str:
    """What a value of the wrong kind is, for a message: text as it is, a class's name, else that of its type."""
    if isinstance(value, str):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def told(error: BaseException, folder: Path | None = None) -> str:
    """An error of somebody else's code in a few words: its type, the first line of its message, and file and line.

    Args:
        folder: of that code; the place is the innermost one in a file below it, else as in `place_of`.
    """
    reason = next(iter(str(error).splitlines()), "") or "no message"
    return f"{type(error).__name__}: {shortened(reason, MAX_SHOWN // 2)}{place_of(error, folder)}"


def place_of(error: BaseException, folder: Path | None = None) -> str:
    """File and line of an error, as `, in FILE line N`: the innermost below `folder`, else outside of installed
    packages, else of all."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    own = [place for place in places if folder is not None and Path(place[0]).is_relative_to(folder)]
    outside = [place for place in places if "site-packages" not in Path(place[0]).parts]
    return "".join(f", in {os.path.relpath(file)} line {line}" for file, line in (own or outside or places)[-1:])


class UsageError(ValueError):
    """A wrong name, value, file or config. One line: expected, got, how to fix."""

    @classmethod
    def of(cls, what: str, *, expected: str, got: object, fix: str) -> "UsageError":
        what, expected, shown, fix = (shortened(str(part)) for part in (what, expected, got, fix))
        return cls(f"{what}: expected {expected}, got {shown}; {fix}")


class RunError(RuntimeError):
    """The work itself failed, for instance because training diverged."""
