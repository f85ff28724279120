"""What the tests of the runner share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.small_suite import do


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    do(folder)
    return folder
