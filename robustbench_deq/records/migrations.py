"""Migrations: what makes records of older schema versions records of the present one.

`MIGRATIONS[0]` takes the fields of version 1 to version 2, `MIGRATIONS[1]` those of version 2 to version 3, and so on;
readers apply all that are missing. A field that may be null can be added within a version: lines without it are read
as null. Any other change of the fields, of their meaning or of their unit is a new version, and one more function here.
Records on disk stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from robustbench_deq.errors import UsageError

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""The fields of a record one version on; it may change its argument, and leaves `schema_version` alone."""

MIGRATIONS: tuple[Migration, ...] = ()
"""None yet: version 1 has gained fields, and lost none."""

SCHEMA_VERSION = 1 + len(MIGRATIONS)


def migrate(values: dict[str, Any], where: str, migrations: Sequence[Migration] = MIGRATIONS) -> dict[str, Any]:
    """The fields of a record of any version up to the present one as those of the present one.

    Args:
        where: what is being read, for the message.

    Raises:
        UsageError: for a record of a newer version, or of none.
    """
    newest, version = 1 + len(migrations), values.get("schema_version")
    if type(version) is not int or not 1 <= version <= newest:
        is_newer = type(version) is int and version > newest
        raise UsageError.of(
            where,
            expected=f"schema_version {newest}" + (" or older" if newest > 1 else ""),
            got=repr(version),
            fix="install the newer robustbench-deq that wrote it" if is_newer else "remove the line",
        )
    for step in migrations[version - 1 :]:
        values = step(values)
    return values | {"schema_version": newest}
