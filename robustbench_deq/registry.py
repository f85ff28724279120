"""A small generic registry: names to values, with wildcards in listings and close matches in errors.

Models, attacks, solvers, adjoints and datasets each live in one `Registry`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Generic, TypeVar

from robustbench_deq.errors import UsageError

T = TypeVar("T")
MAX_LISTED = 12
"""Names in a message; of more only those that resemble what was asked for."""


def closest(name: str, names: Iterable[str]) -> list[str]:
    """At most three of `names` that resemble `name`, the nearest first."""
    return difflib.get_close_matches(name, names, n=3, cutoff=0.4)


def choice(name: str, names: Collection[str], kind: str) -> str:
    """What is expected instead of `name`, for a message: all of `names` when they are few, else the closest.

    Args:
        kind: what they are, with an article ("a registered model").
    """
    close = closest(name, names)
    if 0 < len(names) <= MAX_LISTED:
        return f"one of {', '.join(dict.fromkeys([*close, *names]))}"
    return f"{kind}, closest {', '.join(close)}" if close else kind


class Registry(Generic[T]):
    """An ordered mapping from public names to values.

    Args:
        kind: what is registered, in the singular ("model"); used in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._prefixes: dict[str, tuple[Callable[[str], T], Callable[[], Collection[str]]]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores the decorated object under `name`. Raises `KeyError` when the name is taken."""

        def add(value: T) -> T:
            if name in self._entries:
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = value
            return value

        return add

    def register_prefix(self, prefix: str, get: Callable[[str], T], names: Callable[[], Collection[str]]) -> None:
        """What is named `prefix:NAME` is `get(NAME)`, made when it is asked for; it is in no listing but `prefixed`.

        Args:
            get: raises `UsageError` for names that it does not know.
            names: those that it knows.
        """
        self._prefixes[prefix] = get, names

    def prefixed(self) -> dict[str, Collection[str]]:
        """The names behind every prefix."""
        return {prefix: names() for prefix, (_, names) in self._prefixes.items()}

    def get(self, name: str) -> T:
        """The value stored under `name`. Raises `UsageError` with the names that there are, or the closest of many."""
        if name in self._entries:
            return self._entries[name]
        prefix, _, rest = name.partition(":")
        if prefix in self._prefixes and rest:
            return self._prefixes[prefix][0](rest)
        listed = _LISTED_BY.get(self.kind)
        raise UsageError.of(
            f"unknown {self.kind}",
            expected=choice(name, self._entries, f"a registered {self.kind}"),
            got=repr(name),
            fix=f"list them with 'robustbench-deq {listed}'" if listed else "correct the name",
        )

    def list(self, pattern: str = "*") -> list[str]:
        """Names that match a shell wildcard, in the order of registration."""
        return [name for name in self._entries if fnmatch.fnmatchcase(name, pattern)]

    def values(self) -> tuple[T, ...]:
        """What is registered, in the order of registration."""
        return tuple(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


_LISTED_BY = {
    **{kind: "attacks" for kind in ("attack", "solver", "adjoint", "objective")},
    **{kind: "models" for kind in ("model", "family")},
    "dataset": "datasets",
}
"""The command that lists what is registered of each kind."""
